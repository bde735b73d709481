// Opens the page of data quality again when the worker has stored the report.
"use strict";

const watched = document.querySelector("[data-watch]");

if (watched)
  poll(watched.dataset.watch, (run) => {
    const over = run.state === "completed" || run.state === "failed";
    if (over) reopen();
    watched.querySelector("[data-waiting]").hidden = run.waiting_for === null;
    return over;
  });
