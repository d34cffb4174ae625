"""tools/get_wikitext.py against a hub that lives in a folder."""

import builtins

import pytest

import get_wikitext

ROWS = {
    "wikitext-2-raw-v1/test-00000-of-00001.parquet": ["", " = Robert = \n", "", " Boulter is an actor . Ünïcode \n"],
    "wikitext-2-raw-v1/train-00000-of-00002.parquet": ["", " = First = \n"],
    "wikitext-2-raw-v1/train-00001-of-00002.parquet": [" second half \n", "no newline"],
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet": ["", " v \n"],
    "README.md": [],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serves ROWS; returns the list of files that were fetched."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    fetched = []

    def hf_hub_download(repository, name, repo_type):
        assert (repository, repo_type) == ("Salesforce/wikitext", "dataset")
        fetched.append(name)
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": ROWS[name]}), path, compression="snappy")
        return str(path)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, repo_type: list(ROWS))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return fetched


def test_splits_become_the_original_text(hub, tmp_path, call):
    code, out, err = call(get_wikitext, tmp_path / "a/b", "--dataset", "wikitext-2-raw-v1")
    assert code == 0, err
    folder = tmp_path / "a/b"
    assert sorted(p.name for p in folder.iterdir()) == [
        f"wikitext-2-raw-{s}.txt" for s in ("test", "train", "validation")
    ]
    text = (folder / "wikitext-2-raw-test.txt").read_text(encoding="utf-8")
    assert text == " \n = Robert = \n \n Boulter is an actor . Ünïcode \n"
    text = (folder / "wikitext-2-raw-train.txt").read_text(encoding="utf-8")
    assert text == " \n = First = \n second half \nno newline\n"
    assert "4 lines" in out


def test_what_is_there_is_kept(hub, tmp_path, call):
    arguments = (tmp_path, "--dataset", "wikitext-2-raw-v1", "--split", "test")
    assert call(get_wikitext, *arguments)[0] == 0
    (tmp_path / "wikitext-2-raw-test.txt").write_text("mine")
    code, out, _ = call(get_wikitext, *arguments)
    assert code == 0 and "kept" in out and len(hub) == 1
    assert (tmp_path / "wikitext-2-raw-test.txt").read_text() == "mine"
    assert call(get_wikitext, *arguments, "--overwrite")[0] == 0
    assert "Robert" in (tmp_path / "wikitext-2-raw-test.txt").read_text()


def test_a_download_that_breaks_leaves_no_file_and_goes_on_next_time(hub, tmp_path, call, monkeypatch):
    import huggingface_hub

    works = huggingface_hub.hf_hub_download

    def breaks(repository, name, repo_type):
        if "00001-of-00002" in name:
            raise ConnectionError("connection reset")
        return works(repository, name, repo_type)

    arguments = (tmp_path / "out", "--dataset", "wikitext-2-raw-v1", "--split", "test", "--split", "train")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", breaks)
    code, _, err = call(get_wikitext, *arguments)
    assert code == 3 and "connection reset" in err and err.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["wikitext-2-raw-test.txt"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", works)
    code, out, _ = call(get_wikitext, *arguments)
    assert code == 0 and "kept" in out and (tmp_path / "out/wikitext-2-raw-train.txt").exists()


def test_a_damaged_parquet_file_is_named(hub, tmp_path, call, monkeypatch):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 not really")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(bad))
    code, _, err = call(get_wikitext, tmp_path / "out", "--split", "test", "--dataset", "wikitext-2-raw-v1")
    assert code == 3 and "bad.parquet" in err and err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_changed_layout_is_said(hub, tmp_path, call):
    code, _, err = call(get_wikitext, tmp_path, "--split", "test")  # the 103 set is not on this hub
    assert code == 3 and "wikitext-103-raw-v1/test-*.parquet" in err


def test_no_network_is_one_line(tmp_path, call):
    pytest.importorskip("pyarrow")
    code, _, err = call(get_wikitext, tmp_path)  # conftest sets the hub's offline mode
    assert code == 3 and "Salesforce/wikitext: cannot be fetched" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pyarrow_is_said_before_any_download(tmp_path, call, monkeypatch):
    real_import = builtins.__import__

    def without_pyarrow(name, *rest, **more):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    code, _, err = call(get_wikitext, tmp_path)
    assert code == 3 and "pip install -r scripts/requirements.txt" in err


def test_usage(tmp_path, call):
    assert call(get_wikitext, tmp_path, "--split", "dev")[0] == 2
    assert call(get_wikitext)[0] == 2
    (tmp_path / "file").write_text("")
    assert call(get_wikitext, tmp_path / "file")[0] in (2, 3)
    assert "Example" in call(get_wikitext, "--help")[1]
