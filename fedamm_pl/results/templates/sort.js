"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const original = [...table.tBodies].map((body) => [...body.rows]);
  const text = (row, column) => row.cells[column]?.textContent.trim() ?? "";
  const number = (row, column) => parseFloat(text(row, column).replaceAll(",", "").replace(/^< /, ""));
  const isTitle = (row) => row.cells[0].scope === "rowgroup";
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const filled = original.flat().filter((row) => !isTitle(row) && text(row, column));
      const numeric = filled.every((row) => !Number.isNaN(number(row, column)));
      const order = numeric ? ["descending", "ascending", null] : ["ascending", "descending", null];
      const next = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      const sign = next === "descending" ? -1 : 1;
      const compare = (a, b) => numeric ? number(a, column) - number(b, column)
        : text(a, column).localeCompare(text(b, column), undefined, { numeric: true });
      [...table.tBodies].forEach((body, index) => {
        const titles = original[index].filter(isTitle), rows = original[index].filter((row) => !isTitle(row));
        const full = rows.filter((row) => text(row, column)), empty = rows.filter((row) => !text(row, column));
        body.append(...titles, ...(next ? [...full.sort((a, b) => sign * compare(a, b)), ...empty] : rows));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
    };
  });
}
