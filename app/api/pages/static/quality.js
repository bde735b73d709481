// The page of data quality while a worker measures: it loads again when the report is there.
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
    watched.querySelector("[data-waiting]").hidden = run.waiting_for === null;
  }
  setTimeout(look, 1000);
}

if (watched) setTimeout(look, 500);
