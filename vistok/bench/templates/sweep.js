// A field that leaves only some methods in tables and curves; places that open for a link and for the printer.
{
  const places = [...document.querySelectorAll("details")];
  const bar = document.querySelector(".tools");
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "all";
  label.append("Only methods with ", field);
  bar.append(label);
  for (const open of [true, false]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = open ? "open all" : "close all";
    button.addEventListener("click", () => places.forEach((one) => (one.open = open)));
    bar.append(button);
  }
  const named = [...document.querySelectorAll("[data-m]")];
  const always = ["dense", "random"];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    for (const one of named) {
      const name = one.dataset.m.toLowerCase();
      const shown = !words.length || always.includes(name) || words.some((word) => name.includes(word));
      one.toggleAttribute("data-off", !shown);
    }
  });
  const follow = () => {
    const aim = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    for (let one = aim && aim.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    if (aim) aim.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  follow();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = places.filter((one) => !one.open);
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => closed.forEach((one) => (one.open = false)));
}
