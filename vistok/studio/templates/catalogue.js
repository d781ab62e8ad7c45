// The list of systems: a click, Enter or Space chooses one; arrow keys go up and down in it.
const buttons = () => [...element.querySelectorAll("button[data-slug]")];
let chosen = null;
const mark = () => {
  for (const one of buttons()) if (chosen) one.setAttribute("aria-pressed", one.dataset.slug === chosen);
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-slug]");
  if (!button) return;
  chosen = button.dataset.slug;
  mark();
  trigger("select", { slug: chosen });
});
element.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const all = buttons();
  const next = step && all[all.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
});
watch("value", mark);
