"use strict";
// Sorts and filters tables, shows and hides providers and devices, shows tooltips of marks.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Tables: a button in the head sorts by its column, once more in the other direction.

function valueOf(row, column, numeric) {
  const cell = row.cells[column];
  if (!numeric) return cell.textContent.trim();
  return cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  if (typeof a === "number") return a - b;
  return a.localeCompare(b, "en", { numeric: true });
}

function sort(header) {
  const column = header.cellIndex;
  const numeric = header.classList.contains("n");
  const before = header.getAttribute("aria-sort");
  // Numbers start with the largest, words with the first of the alphabet.
  const down = before ? before === "ascending" : numeric;
  const body = header.closest("table").tBodies[0];
  const missing = (value) => value === null || value === "";
  const rows = all("tr", body).map((row) => [valueOf(row, column, numeric), row]);
  rows.sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return down ? compare(b, a) : compare(a, b);
  });
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.classList.remove("grouped");
  body.append(...rows.map(([, row]) => row));
}

function filter(table) {
  const words = table.querySelector("input").value.toLowerCase().split(/\s+/);
  const chosen = all("select", table).filter((select) => select.value);
  const rows = all("tbody tr", table);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const matches = words.every((word) => text.includes(word)) &&
      chosen.every((select) => row.dataset[select.dataset.filter] === select.value);
    row.hidden = !matches;
    shown += matches;
  }
  const total = `${rows.length} rows`;
  table.querySelector("output").textContent = shown < rows.length ? `${shown} of ${total}` : total;
}

for (const button of all("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
for (const table of all(".table")) {
  table.addEventListener("input", () => filter(table));
}
// The name of an op in a figure filters the table of speeds.
for (const link of all("a[data-search]")) {
  link.addEventListener("click", () => {
    for (const table of all("#speed .table")) {
      table.querySelector("input").value = link.dataset.search;
      filter(table);
    }
  });
}

// Legends: a provider's marks, in all figures of a device. Devices: all their blocks.

function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(pressed));
}

function toggled(button) {
  return button.getAttribute("aria-pressed") !== "true";
}

function same(name, value) {
  return (element) => element.dataset[name] === value;
}

for (const button of all(".legend button")) {
  button.addEventListener("click", () => {
    const { device } = button.closest(".device").dataset;
    const { provider } = button.dataset;
    const show = toggled(button);
    for (const block of all(".device").filter(same("device", device))) {
      press(all(".legend button", block).filter(same("provider", provider)), show);
      for (const element of all("svg [data-provider]", block).filter(same("provider", provider))) {
        element.style.display = show ? "" : "none";
      }
    }
  });
}
for (const button of all(".devices button")) {
  button.addEventListener("click", () => {
    const show = toggled(button);
    press([button], show);
    for (const block of all(".device").filter(same("device", button.dataset.device))) {
      block.hidden = !show;
    }
  });
}

// Tooltips: of the mark that is nearest to the pointer, or has the focus. The arrow keys move
// between the marks of a figure, of which one is reached by the tab key.

const REACH = 20; // pixels
const tip = document.getElementById("tip");
let near = null;

function show(mark) {
  near?.classList.remove("near");
  near = mark;
  tip.hidden = !mark;
  if (!mark) return;
  mark.classList.add("near");
  tip.textContent = mark.dataset.tip;
  const at = mark.getBoundingClientRect();
  const left = at.left + at.width / 2 - tip.offsetWidth / 2;
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above < 8 ? at.bottom + 8 : above}px`;
}

function nearest(marks, event) {
  let best = null;
  let least = REACH;
  for (const mark of marks) {
    if (mark.style.display === "none") continue;
    const at = mark.getBoundingClientRect();
    const x = at.left + at.width / 2 - event.clientX;
    const y = at.top + at.height / 2 - event.clientY;
    const distance = Math.hypot(x, y);
    if (distance < least) [best, least] = [mark, distance];
  }
  return best;
}

function step(marks, mark, key) {
  const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
  if (!by) return false;
  const shown = marks.filter((other) => other.style.display !== "none");
  const next = shown[(shown.indexOf(mark) + by + shown.length) % shown.length];
  mark.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
  return true;
}

for (const plot of all("svg")) {
  const marks = all(".mark", plot);
  marks.forEach((mark, i) => {
    const title = mark.querySelector("title");
    mark.dataset.tip = title.textContent;
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", title.textContent.replaceAll("\n", ", "));
    mark.setAttribute("tabindex", i ? "-1" : "0");
    title.remove(); // else the browser shows a second tooltip
  });
  if (!marks.length) continue;
  const area = plot.parentElement; // marks at the edge of a plot reach over it
  area.addEventListener("pointermove", (event) => show(nearest(marks, event)));
  area.addEventListener("pointerdown", (event) => show(nearest(marks, event)));
  area.addEventListener("pointerleave", () => show(null));
  plot.addEventListener("focusin", (event) => show(event.target));
  plot.addEventListener("focusout", () => show(null));
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
    else if (step(marks, event.target, event.key)) event.preventDefault();
  });
}
addEventListener("scroll", () => show(null), { passive: true });
addEventListener("beforeprint", () => all("details").forEach((details) => { details.open = true; }));
