#include "lexico/text_source.h"
