// What makes the admins' pages handier. Without it every page works: forms send, links lead on, tables stand as they
// come. No library; nothing is fetched but from this service.
"use strict";

// Sortable tables: a button in each heading of `table.sortable`. A cell's data-value sorts, where its text would not.
function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.classList.contains("unsorted") || !heading.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => {
        const cell = row.cells[column];
        return cell === undefined ? "" : cell.dataset.value ?? cell.textContent.trim();
      };
      const rows = [...body.rows].sort((a, b) => compared(key(a), key(b)));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}

function compared(a, b) {
  const [x, y] = [Number(a), Number(b)];
  if (a !== "" && b !== "" && !Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  return a.localeCompare(b, undefined, { numeric: true });
}

// Ids that differ in what cannot be seen alone look different in a list. The server's pages say it likewise.
const HIDDEN = /^ | $|(?<= ) |(?! )[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800⟨]/gu;
const visible = (id) => id.replace(HIDDEN, (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// Ids as one types: an input with data-complete asks that address for ids with its prefix and lists them.
function completing(input) {
  const list = document.createElement("datalist");
  list.id = `${input.id}-found`;
  input.after(list);
  input.setAttribute("list", list.id);
  let asked = "";
  let waiting;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(async () => {
      const prefix = input.value;
      if (!prefix || prefix === asked) return;
      asked = prefix;
      const address = `${input.dataset.complete}?prefix=${encodeURIComponent(prefix)}`;
      const answer = await fetch(address, { headers: { Accept: "application/json" } }).catch(() => undefined);
      if (!answer?.ok || input.value !== prefix) return;
      const found = await answer.json();
      list.replaceChildren(
        ...found.user_ids.map((id) => {
          const option = document.createElement("option");
          option.value = id;
          option.label = visible(id);
          return option;
        }),
      );
    }, 120);
  });
}

// Text to copy: a button beside each element with data-copy.
function copying(source) {
  if (!navigator.clipboard) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(source.dataset.copy || source.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  source.before(button);
}

// Times as people say them grow old while a page stands open.
function aging() {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  document.querySelectorAll("time[title]").forEach((element) => {
    const apart = (Date.now() - Date.parse(element.dateTime)) / 1000;
    const size = Math.abs(apart);
    const place = units.findIndex(([, seconds]) => size >= seconds);
    if (place < 0) {
      element.textContent = "just now";
      return;
    }
    const [unit, seconds] = units[place];
    const whole = Math.floor(size / seconds);
    let said = `${whole} ${unit}`;
    if (place + 1 < units.length && whole < 10) {
      const [smaller, fewer] = units[place + 1];
      const rest = Math.floor((size % seconds) / fewer);
      if (rest) said += ` ${rest} ${smaller}`;
    }
    element.textContent = apart >= 0 ? `${said} ago` : `in ${said}`;
  });
}

function enhance(root) {
  root.querySelectorAll("table.sortable").forEach(sortable);
  root.querySelectorAll("[data-copy]").forEach(copying);
}

enhance(document);
document.querySelectorAll("input[data-complete]").forEach(completing);
setInterval(aging, 5000);
