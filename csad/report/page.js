"use strict";
// Sorting, filtering by score and counting; everything else on the page works without this script.
(() => {
  const byId = (id) => document.getElementById(id);
  const grid = document.querySelector(".cards");
  const cards = [...grid.children];
  const splits = ["good", "logical", "structural"];
  const errors = ["missed", "false-alarm", "right"];
  const score = (card) => Number(card.dataset.score);
  const orders = {
    "score-falling": (a, b) => score(b) - score(a),
    "score-rising": (a, b) => score(a) - score(b),
    error: (a, b) => errors.indexOf(a.dataset.error) - errors.indexOf(b.dataset.error) || score(b) - score(a),
    split: (a, b) => splits.indexOf(a.dataset.split) - splits.indexOf(b.dataset.split) || score(b) - score(a),
    name: (a, b) => a.dataset.category - b.dataset.category
      || splits.indexOf(a.dataset.split) - splits.indexOf(b.dataset.split) || a.dataset.name.localeCompare(b.dataset.name),
  };
  const limit = (id, otherwise) => (byId(id).value === "" ? otherwise : Number(byId(id).value));
  const show = () => {
    const from = limit("from", -Infinity);
    const to = limit("to", Infinity);
    for (const card of cards) card.hidden = score(card) < from || score(card) > to;
    const visible = cards.filter((card) => getComputedStyle(card).display !== "none").length;
    byId("count").textContent = `${visible} of ${cards.length} images`;
  };
  byId("sort").addEventListener("change", () => grid.append(...cards.sort(orders[byId("sort").value])));
  const form = document.querySelector(".filters");
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.reset(); // browsers keep choices over a reload, and the cards come in their first order
  document.querySelector(".scripted").hidden = false;
  show();
})();
