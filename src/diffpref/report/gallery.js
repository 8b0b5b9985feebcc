// Sorts and filters the gallery. Without it the page shows the pairs as they were chosen.
"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const [chosen, sorted, said] = [at("chosen"), at("sorted"), at("said")];
  const fields = ["sort", "order", "scorer", "folder", "category", "words"].map(at).filter(Boolean);
  const value = (id) => at(id)?.value ?? "";
  const groups = [...chosen.querySelectorAll(".cards")].map((grid) => ({ grid, cards: [...grid.children] }));
  const numbers = (text) => text.split(",").map(Number);

  // A pair may stand in several groups; each is sorted once.
  const pairs = new Map();
  for (const card of groups.flatMap((group) => group.cards)) {
    const place = Number(card.dataset.place);
    if (pairs.has(place)) continue;
    const prompt = card.querySelector(".prompt").textContent;
    pairs.set(place, {
      card,
      place,
      prompt,
      words: prompt.toLowerCase(),
      category: card.dataset.category,
      scores: card.dataset.scores.split(";").map(numbers),
      drifts: numbers(card.dataset.drifts),
    });
  }

  function key(pair) {
    const scores = pair.scores[Number(value("scorer"))];
    const folder = Number(value("folder"));
    const by = value("sort");
    if (by === "difference") return scores[folder] - scores[0];
    if (by === "drift") return pair.drifts[folder - 1];
    if (by.startsWith("score-")) return scores[Number(by.slice("score-".length))];
    return pair.place;
  }

  function inOrder(found) {
    const by = value("sort");
    if (by === "chosen") return found;
    const sign = value("order") === "up" ? 1 : -1;
    const keyed = found.map((pair) => ({ pair, key: key(pair) }));
    const compare = by === "prompt"
      ? (a, b) => -sign * a.pair.prompt.localeCompare(b.pair.prompt)
      : (a, b) => sign * (a.key - b.key);
    return keyed.sort((a, b) => compare(a, b) || a.pair.place - b.pair.place).map((each) => each.pair);
  }

  function show() {
    const category = value("category");
    const words = value("words").trim().toLowerCase();
    const plain = value("sort") === "chosen" && !category && !words;
    for (const id of ["order", "scorer", "folder"]) at(id).disabled = value("sort") === "chosen";
    chosen.hidden = !plain;
    sorted.hidden = plain;
    if (plain) {
      for (const { grid, cards } of groups) grid.append(...cards);
      said.textContent = "";
      return;
    }
    const found = [...pairs.values()].filter(
      (pair) => (!category || pair.category === category) && pair.words.includes(words),
    );
    sorted.replaceChildren(...inOrder(found).map((pair) => pair.card));
    said.textContent = `${found.length} of the ${pairs.size} pairs on this page`;
  }

  for (const field of fields) field.addEventListener(field.tagName === "SELECT" ? "change" : "input", show);
  at("controls").hidden = false;
  show();
})();
