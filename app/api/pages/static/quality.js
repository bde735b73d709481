// Reloads the page of data quality when the worker has stored the report.
"use strict";

const watched = document.querySelector("[data-watch]");

async function poll() {
  const answer = await fetch(watched.dataset.watch, { headers: { Accept: "application/json" } }).catch(() => undefined);
  if (answer?.ok) {
    const run = await answer.json();
    if (run.state === "completed" || run.state === "failed") {
      location.assign(location.pathname); // reload() would send a form again
      return;
    }
    watched.querySelector("[data-waiting]").hidden = run.waiting_for === null;
  }
  setTimeout(poll, 1000);
}

if (watched) setTimeout(poll, 500);
