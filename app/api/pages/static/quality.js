// The page of data quality while a worker measures: how far it is, and the page anew when the report is there.
"use strict";

const watched = document.querySelector("[data-watch]");

async function look() {
  const answer = await fetch(watched.dataset.watch, { headers: { Accept: "application/json" } }).catch(() => undefined);
  if (answer?.ok) {
    const run = await answer.json();
    if (run.state === "completed" || run.state === "failed") {
      location.assign(location.pathname); // not reload(), which would send a form again
      return;
    }
    const bar = watched.querySelector("progress");
    const words = watched.querySelector("[data-words]");
    if (run.total) {
      bar.max = run.total;
      bar.value = run.done;
      words.textContent = `${run.done.toLocaleString("en").replaceAll(",", "\u202f")} of ${run.total.toLocaleString("en").replaceAll(",", "\u202f")} users`;
    }
    const waiting = watched.querySelector("[data-waiting]");
    waiting.hidden = run.waiting_for === null;
  }
  setTimeout(look, 1000);
}

if (watched) setTimeout(look, 500);
