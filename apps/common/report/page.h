#pragma once

// The style sheet and the script of the HTML report. The page is complete without the script: it
// only adds tabs, sorting, a filter and quicker tooltips.
namespace lexico::report {

inline constexpr const char* kStyle = R"css(
:root{color-scheme:light dark;
--bg:#fbfbf9;--card:#fff;--ink:#1c2024;--soft:#5b6470;--line:#e3e4e0;--accent:#0b63a5;--good:#00785a;--warn:#b34700;--heat:11,99,165;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a8508a;--c4:#8a6d00;--c5:#2f2f7f;--g0:#5f6b76;--g1:#98a1a9}
@media (prefers-color-scheme:dark){:root{
--bg:#14171a;--card:#1b1f23;--ink:#e7e9ea;--soft:#9aa4ae;--line:#2e343a;--accent:#6db3ee;--good:#4cc9a4;--warn:#ff9d5c;--heat:86,170,235;
--c0:#58aeea;--c1:#ff8a47;--c2:#35c79c;--c3:#e08fc3;--c4:#e0b83d;--c5:#a7a5f2;--g0:#a3adb6;--g1:#727c85}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:36px 24px 72px}
header .eyebrow{font-size:12px;letter-spacing:.08em;text-transform:uppercase;color:var(--accent);font-weight:600}
h1{font-size:28px;line-height:1.2;margin:4px 0 6px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em}
h3{font-size:15px;margin:22px 0 6px}
p{margin:4px 0 14px;max-width:78ch}
.sub,.cap{color:var(--soft)}
.cap{font-size:14px}
.verdict{margin:20px 0;padding:14px 18px;background:var(--card);border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:6px;font-size:16px}
.note{margin:10px 0;padding:10px 16px;border-left:4px solid var(--warn);background:var(--card);border-radius:4px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:20px 0 8px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:27px;line-height:1.2;font-weight:600;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tile span{display:block;font-size:13px;color:var(--soft)}
.tile .name{color:var(--ink);font-weight:500}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 14px 6px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit;fill:var(--ink);font-size:12px}
svg .ti{font-weight:600;font-size:14px}
svg .tk,svg .lb{fill:var(--soft)}
svg tspan.lb{font-weight:400;font-size:12px}
svg .gr{stroke:var(--line);stroke-width:1}
svg .ax{stroke:var(--soft);stroke-width:1}
svg g{--s:var(--l)}
svg .ln{fill:none;stroke:var(--s);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .ln.da{stroke-dasharray:5 4.5}
svg .mk{fill:var(--s);stroke:var(--card);stroke-width:1}
svg .mk.ho{fill:var(--card);stroke:var(--s);stroke-width:1.8}
svg .hit{fill:transparent;cursor:crosshair}
svg .hit:hover{fill:var(--s);fill-opacity:.22}
@media (prefers-color-scheme:dark){svg g{--s:var(--d)}}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:10px 0 12px;font-size:13.5px;align-items:center}
.legend>span{display:inline-flex;align-items:center;gap:7px;white-space:nowrap}
.legend .is{color:var(--soft)}
svg.sw{display:inline-block;width:28px;height:12px}
.ramp{display:inline-block;width:120px;height:10px;border-radius:5px}
.ramp.on-dark{display:none}
@media (prefers-color-scheme:dark){.ramp{display:none}.ramp.on-dark{display:inline-block}}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:8px 0 14px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child>td,tr:last-child>th{border-bottom:0}
th{font-weight:600;color:var(--soft)}
thead th{background:var(--card);position:sticky;top:0}
th:first-child,td:first-child,.l{text-align:left}
tr.mean th,tr.mean td{font-weight:600;color:var(--ink);border-top:2px solid var(--line)}
tr.base th,tr.base td{color:var(--soft)}
.facts th{width:1%;padding-right:28px;vertical-align:top}
.edge{border-left:1px solid var(--line)}
td.h{background:rgba(var(--heat),calc(var(--v,0)*.34))}
.wrap{white-space:normal;overflow-wrap:anywhere;min-width:13em}
td details{margin:0}
td summary{padding:0}
.tabs{display:none;gap:6px;margin:10px 0 2px}
.js .tabs{display:flex}
.tabs button{font:inherit;font-size:13.5px;padding:4px 14px;border:1px solid var(--line);border-radius:99px;background:var(--card);color:var(--ink);cursor:pointer}
.tabs button[aria-selected=true]{background:var(--accent);border-color:var(--accent);color:var(--bg)}
details{margin:10px 0}
summary{cursor:pointer;font-weight:500;padding:4px 0}
#filter{display:none;font:inherit;font-size:14px;padding:6px 12px;margin:6px 0;width:min(340px,100%);border:1px solid var(--line);border-radius:6px;background:var(--card);color:var(--ink)}
.js #filter{display:block}
.js table.sort thead th{cursor:pointer}
.all{max-height:560px;overflow:auto}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 16px;overflow-x:auto;font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:48px;color:var(--soft);font-size:13px}
#tip{position:fixed;z-index:9;pointer-events:none;display:none;background:var(--ink);color:var(--bg);padding:7px 11px;border-radius:6px;font-size:13px;line-height:1.45;white-space:pre;font-variant-numeric:tabular-nums;box-shadow:0 3px 14px rgba(0,0,0,.25)}
@media print{:root{color-scheme:light;--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--accent:#0b63a5;--heat:11,99,165;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a8508a;--c4:#8a6d00;--c5:#2f2f7f;--g0:#5f6b76;--g1:#98a1a9}
svg g{--s:var(--l)}.ramp{display:inline-block}.ramp.on-dark{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:12px}main{max-width:none;padding:0}
.charts{grid-template-columns:1fr 1fr}figure,.tile,tr,.verdict{break-inside:avoid}h2,h3{break-after:avoid}
.js .tabs,.js #filter{display:none}.js .tab[hidden]{display:block}.scroll{overflow:visible}}
)css";

inline constexpr const char* kScript = R"js(
(function(){
var root=document.documentElement;root.classList.add('js');
document.querySelectorAll('.tabs').forEach(function(bar){
  var tabs=[].slice.call(bar.parentNode.querySelectorAll('.tab')),buttons=[].slice.call(bar.querySelectorAll('button'));
  function show(i){tabs.forEach(function(t,j){t.hidden=i!==j});buttons.forEach(function(b,j){b.setAttribute('aria-selected',i===j)})}
  buttons.forEach(function(b,i){b.addEventListener('click',function(){show(i)})});
  show(Math.max(0,buttons.findIndex(function(b){return b.hasAttribute('data-first')})));
});
var tip=document.createElement('div');tip.id='tip';document.body.appendChild(tip);
document.querySelectorAll('.hit').forEach(function(hit){
  var title=hit.querySelector('title'),text=title.textContent;hit.removeChild(title);
  hit.addEventListener('pointerenter',function(){tip.textContent=text;tip.style.display='block'});
  hit.addEventListener('pointermove',function(e){
    var w=tip.offsetWidth,h=tip.offsetHeight,x=e.clientX+14,y=e.clientY+14;
    if(x+w>innerWidth-8)x=e.clientX-w-14;if(y+h>innerHeight-8)y=e.clientY-h-14;
    tip.style.left=Math.max(4,x)+'px';tip.style.top=Math.max(4,y)+'px'});
  hit.addEventListener('pointerleave',function(){tip.style.display='none'});
});
document.querySelectorAll('table.sort').forEach(function(table){
  var body=table.tBodies[0];
  [].forEach.call(table.tHead.rows[0].cells,function(th,i){var up=false;th.title='Sort';th.addEventListener('click',function(){
    up=!up;var rows=[].slice.call(body.rows);
    rows.sort(function(a,b){a=a.cells[i].textContent.replace(/,/g,'');b=b.cells[i].textContent.replace(/,/g,'');
      var d=isNaN(a)||isNaN(b)?a.localeCompare(b):a-b;return up?d:-d});
    rows.forEach(function(r){body.appendChild(r)})})});
});
var filter=document.getElementById('filter');
if(filter)filter.addEventListener('input',function(){
  var words=filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  [].forEach.call(document.querySelectorAll('#all tbody tr'),function(r){
    var cells=[].map.call(r.cells,function(c){return c.textContent.toLowerCase()});
    r.hidden=!words.every(function(w){return cells.some(function(c){return c.indexOf(w)>=0})})})});
})();
)js";

}  // namespace lexico::report
