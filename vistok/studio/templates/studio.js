// The patches of the tab Look and the scrubber of the tab Layers. All text goes in as text, never as HTML.
(() => {
  const told = new WeakMap();
  const data = (element, name) => {
    if (!told.has(element)) told.set(element, JSON.parse(element.dataset[name] || "null"));
    return told.get(element);
  };
  const SVG = "http://www.w3.org/2000/svg";
  let here = null; // row and column under the cursor; it stays when a new card comes

  const mark = (grids, cell) => {
    for (const grid of grids) {
      const rect = grid.querySelector(".vt-here");
      if (!rect) continue;
      rect.removeAttribute("hidden");
      rect.setAttribute("x", cell.column);
      rect.setAttribute("y", cell.row);
    }
  };

  const show = (explorer, cell, aloud) => {
    const known = data(explorer, "cells");
    if (!known) return;
    const [height, width] = known.grid;
    cell = { row: Math.min(Math.max(cell.row, 0), height - 1), column: Math.min(Math.max(cell.column, 0), width - 1) };
    here = cell;
    const patch = cell.row * width + cell.column;
    explorer.querySelector(".vt-at").textContent = `Row ${cell.row + 1}, column ${cell.column + 1}`;
    const said = [];
    known.methods.forEach((method, number) => {
      const cells = explorer.querySelectorAll(`[data-row="${number}"] td`);
      cells[0].textContent = method.fate[patch];
      cells[1].textContent = method.score[patch];
      said.push(`${method.name}: ${method.fate[patch]}, ${method.score[patch]}`);
    });
    const grids = explorer.querySelectorAll(".vt-grid");
    mark(grids, cell);
    grids.forEach((grid, number) => {
      const group = grid.querySelector(".vt-group"), place = known.methods[number].place;
      group.replaceChildren();
      const members = place[patch] < 0 ? [] : place.flatMap((to, at) => (to === place[patch] ? [at] : []));
      if (members.length < 2 || members.length === place.length) return;
      for (const at of members) {
        const rect = document.createElementNS(SVG, "rect");
        rect.setAttribute("x", at % width);
        rect.setAttribute("y", Math.floor(at / width));
        rect.setAttribute("width", 1);
        rect.setAttribute("height", 1);
        group.append(rect);
      }
    });
    if (aloud) explorer.querySelector(".vt-live").textContent = `Row ${cell.row + 1}, column ${cell.column + 1}. ${said.join(". ")}`;
  };

  const cellOf = (grid, event, [height, width]) => {
    const box = grid.getBoundingClientRect();
    const at = (from, size, count) => Math.min(count - 1, Math.max(0, Math.floor((from / size) * count)));
    return { row: at(event.clientY - box.top, box.height, height), column: at(event.clientX - box.left, box.width, width) };
  };

  // The share of the answer's attention that a patch gets in the layer that is shown.
  const weigh = (layers, cell, aloud) => {
    const known = data(layers, "told"), [height, width] = known.grid;
    cell = { row: Math.min(Math.max(cell.row, 0), height - 1), column: Math.min(Math.max(cell.column, 0), width - 1) };
    here = cell;
    const patch = cell.row * width + cell.column, layer = Number(layers.querySelector(".vt-layer").value) - 1;
    const said = known.methods.map((method) => {
      if (method.places[layer][patch] < 0) return `${method.name} gone`;
      if (!method.cells) return `${method.name} cannot be read`;
      return `${method.name} ${(100 * method.cells[layer][method.places[layer][patch]]).toPrecision(2)}%`;
    });
    const at = `Row ${cell.row + 1}, column ${cell.column + 1}`;
    layers.querySelector(".vt-at").textContent = at;
    layers.querySelector(".vt-hint").textContent = said.join(" · ");
    mark(layers.querySelectorAll(".vt-grid"), cell);
    if (aloud) layers.querySelector(".vt-live").textContent = `${at}. ${said.join(", ")}`;
  };

  const ROOTS = ".vt-explorer, .vt-layers";
  const gridOf = (root) => data(root, root.matches(".vt-layers") ? "told" : "cells").grid;
  const move = (root, cell, aloud) => (root.matches(".vt-layers") ? weigh : show)(root, cell, aloud);
  const point = (event) => {
    const grid = event.target.closest?.(".vt-grid"), root = grid?.closest(ROOTS);
    if (root) move(root, cellOf(grid, event, gridOf(root)), false);
  };
  document.addEventListener("pointermove", point);
  document.addEventListener("pointerdown", (event) => {
    point(event);
    const root = event.target.closest?.(".vt-grid")?.closest(ROOTS);
    if (root && event.pointerType === "mouse") {
      event.preventDefault(); // the arrow keys go on from here
      root.querySelector(".vt-cursor").focus({ preventScroll: true });
    }
  });

  document.addEventListener("keydown", (event) => {
    const root = event.target.closest?.(".vt-cursor")?.closest(ROOTS);
    if (!root || event.ctrlKey || event.metaKey || event.altKey) return;
    const now = here || { row: 0, column: -1 }, last = gridOf(root)[1] - 1;
    const next = {
      ArrowLeft: { ...now, column: now.column - 1 },
      ArrowRight: { ...now, column: now.column + 1 },
      ArrowUp: { ...now, row: now.row - 1 },
      ArrowDown: { ...now, row: now.row + 1 },
      Home: { ...now, column: 0 },
      End: { ...now, column: last },
    }[event.key];
    if (!next) return;
    event.preventDefault();
    move(root, next, true);
  });

  // Tabs: arrow keys, Home and End, as people know them from elsewhere.
  document.addEventListener("keydown", (event) => {
    const tabs = [...(event.target.closest?.("[role=tablist]")?.querySelectorAll("[role=tab]") || [])];
    const at = tabs.indexOf(event.target), step = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 };
    if (at < 0 || !(event.key in step)) return;
    event.preventDefault();
    const next = tabs[(step[event.key] + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });

  const scrub = (layers, number) => {
    const known = data(layers, "told");
    layers.style.setProperty("--layer", number - 1);
    layers.querySelector(".vt-layer-now").textContent = number;
    const said = [];
    layers.querySelectorAll("[data-method]").forEach((card, at) => {
      const method = known.methods[at];
      card.querySelector(".vt-left").textContent = method.left[number - 1];
      if (method.mass) card.querySelector(".vt-mass").textContent = `${Math.round(100 * method.mass[number - 1])}%`;
      card.querySelectorAll(".vt-bar").forEach((bar) => bar.classList.toggle("vt-now", Number(bar.dataset.layer) === number));
      said.push(`${method.name}: ${method.left[number - 1]} tokens`);
    });
    layers.querySelector(".vt-live").textContent = `Layer ${number}. ${said.join(", ")}`;
    if (here && known.grid) weigh(layers, here, false);
  };
  document.addEventListener("input", (event) => {
    if (event.target.matches?.(".vt-layer")) scrub(event.target.closest(".vt-layers"), Number(event.target.value));
  });

  // New cards take over the cursor; new layers begin at the first.
  new MutationObserver(() => {
    for (const explorer of document.querySelectorAll(".vt-explorer:not([data-ready])")) {
      explorer.dataset.ready = "";
      if (here && data(explorer, "cells")) show(explorer, here, false);
    }
    for (const layers of document.querySelectorAll(".vt-layers:not([data-ready])")) {
      layers.dataset.ready = "";
      scrub(layers, 1);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
