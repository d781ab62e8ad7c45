// The points of a plot: one stop of the Tab key, arrows among them, Enter, Space, click or tap to choose one.
let chosen = null, lit = null, open = matchMedia("(min-width: 900px)").matches;
const NEAR = 26; // pixels from a point that still count as on it
const points = () => [...element.querySelectorAll(".point")];
const readout = (text) => {
  const line = element.querySelector(".readout");
  if (line) line.textContent = text || line.dataset.rest;
};
const draw = () => {
  const all = points();
  const stop = all.find((one) => one.dataset.key === chosen) || all[0];
  for (const one of all) {
    one.setAttribute("aria-pressed", one.dataset.key === chosen);
    one.setAttribute("tabindex", one === stop ? 0 : -1);
  }
  for (const one of element.querySelectorAll(".legend button")) one.setAttribute("aria-pressed", one.dataset.series === lit);
  const tables = element.querySelector("details");
  if (tables) tables.open = open;
  const named = [...element.querySelectorAll(".series")];
  const some = named.some((one) => one.dataset.series === lit);
  for (const one of named) one.classList.toggle("faded", some && one.dataset.series !== lit);
};
const choose = (key) => {
  chosen = key;
  draw();
  trigger("select", { key });
};
const nearest = (event) => {
  const svg = event.target.closest && event.target.closest(".plot > svg");
  if (!svg) return null;
  let best = null, least = NEAR;
  for (const one of points()) {
    if (one.closest(".faded")) continue;
    const at = new DOMPoint(one.dataset.x, one.dataset.y).matrixTransform(svg.getScreenCTM());
    const far = Math.hypot(at.x - event.clientX, at.y - event.clientY);
    if (far < least) [best, least] = [one, far];
  }
  return best;
};
element.addEventListener("click", (event) => {
  const legend = event.target.closest(".legend button");
  if (legend) {
    lit = lit === legend.dataset.series ? null : legend.dataset.series;
    return draw();
  }
  if (event.target.closest("summary")) open = !event.target.closest("details").open;
  const button = event.target.closest("table button");
  const point = button || nearest(event);
  if (!point) return;
  if (!button) point.focus();
  choose(point.dataset.key);
});
element.addEventListener("pointermove", (event) => {
  const near = nearest(event);
  for (const one of points()) one.classList.toggle("near", one === near);
  if (event.target.closest(".plot")) readout(near && near.getAttribute("aria-label"));
});
element.addEventListener("focusin", (event) => {
  if (event.target.matches(".point")) readout(event.target.getAttribute("aria-label"));
});
element.addEventListener("keydown", (event) => {
  const point = event.target.closest(".point");
  if (!point) return;
  if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    return choose(point.dataset.key);
  }
  const along = [...point.closest(".series").querySelectorAll(".point")];
  const [x, y] = [Number(point.dataset.x), Number(point.dataset.y)];
  // Up and down: the next of those that stand about as far to the right, whatever their method.
  const column = points().filter((one) => Math.abs(one.dataset.x - x) < 30 && !one.closest(".faded"));
  column.sort((a, b) => b.dataset.y - a.dataset.y);
  const step = { ArrowRight: [along, 1], ArrowLeft: [along, -1], ArrowUp: [column, 1], ArrowDown: [column, -1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const next = step[0][step[0].indexOf(point) + step[1]];
  if (!next) return;
  for (const one of points()) one.setAttribute("tabindex", one === next ? 0 : -1);
  next.focus();
});
watch("value", draw);
draw();
