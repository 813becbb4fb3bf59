// The list of rules: a new optimizer adds its header and its name here.
#pragma once

#include "rules/adam.h"
#include "rules/nadam.h"
#include "rules/sgd.h"

#define DRACOPT_FOR_EACH_RULE(apply) apply(Adam) apply(NAdam) apply(Sgd)
