// Click a heading to sort its table; without this script the tables are as they were measured.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return cell.dataset.value;
    return (cell.firstChild ? cell.firstChild.textContent : "").trim().replace(/%$/, ""); // without its interval
  };
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is not known stands last, either way
        const numbers = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -numbers : numbers;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
