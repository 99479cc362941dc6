// The order of search results: the pages about the dialects come last, because their names
// (`timeout`, `close`) are also names of trisock. The numbers are Sphinx's defaults.
const DIALECTS = /^(api-)?(pluto|hammerspoon)|^dialect-tests/;

var Scorer = {
  score: ([page, , , , score]) => (DIALECTS.test(page) ? score - 100 : score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
