// Enhancements of the admins' pages, which also work without JavaScript: sortable tables, completion of ids, copy buttons,
// relative times. No library is used, and requests go to this service only.
"use strict";

// Sortable tables: a button in each heading of `table.sortable`. Rows are sorted by the data-value of a cell, or its text.
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

// Shows invisible characters of an id as codes, as the server does, so that similar ids can be told apart in a list.
const HIDDEN = /^ | $|(?<= ) |(?! )[\p{C}\p{Z}\p{Default_Ignorable_Code_Point}\u2800⟨]/gu;
const visible = (id) => id.replace(HIDDEN, (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

// Completion: an input with data-complete requests ids that begin with its value from that address.
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

// A copy button before each element with data-copy. It copies that attribute, or the text if the attribute is empty.
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

// Updates relative times while a page stays open.
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
    let text = `${whole} ${unit}`;
    if (place + 1 < units.length && whole < 10) {
      const [smaller, fewer] = units[place + 1];
      const rest = Math.floor((size % seconds) / fewer);
      if (rest) text += ` ${rest} ${smaller}`;
    }
    element.textContent = apart >= 0 ? `${text} ago` : `in ${text}`;
  });
}

// Adds the browser's time to times in UTC, on hover if the time is relative.
function local(element) {
  const at = new Date(element.dateTime);
  if (Number.isNaN(at.getTime()) || at.getTimezoneOffset() === 0 || element.dataset.local) return;
  const here = at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
  element.dataset.local = here;
  if (element.title) element.title += `, ${here} here`;
  else element.textContent += ` (${here} here)`;
}

// Opens the page of this address again. Unlike reload(), it does not send a form again.
const reopen = () => location.assign(location.pathname);

// Requests JSON from `address` once a second, until `show` returns true for it. An error is tried again. If the session
// has ended, the page is opened again, which redirects to sign in.
const POLL_MS = 1000;
const POLL_TIMEOUT_MS = 10000;
async function poll(address, show) {
  for (;;) {
    const answer = await fetch(address, {
      headers: { Accept: "application/json" },
      signal: AbortSignal.timeout(POLL_TIMEOUT_MS),
    }).catch(() => null);
    const body = answer?.ok ? await answer.json().catch(() => null) : null;
    if (answer?.status === 401) return reopen();
    if (body !== null && show(body)) return;
    await new Promise((resume) => setTimeout(resume, POLL_MS));
  }
}

function enhance(root) {
  root.querySelectorAll("time[datetime]").forEach(local);
  root.querySelectorAll("table.sortable").forEach(sortable);
  root.querySelectorAll("[data-copy]").forEach(copying);
}

enhance(document);
// On a narrow screen, charts are drawn on demand, so that the page stays short.
if (matchMedia("(max-width: 700px)").matches) document.querySelectorAll("details.fold").forEach((part) => (part.open = false));
document.querySelectorAll("input[data-complete]").forEach(completing);
setInterval(aging, 5000);
