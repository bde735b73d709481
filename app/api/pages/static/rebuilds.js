// Shows the progress of rebuilds: polls the run of each element with data-follow until the run ends, and updates the
// parts of the element. Without JavaScript the page of a run reloads itself.
"use strict";

const KINDS = { queued: "warn", running: "none", completed: "good", cancelled: "none", failed: "bad" };

function number(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(3, String(Math.trunc(value)).length) }).replaceAll(",", "\u202f");
}

function duration(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1).replace(".0", "")} s`;
  if (seconds < 60) return `${Math.trunc(seconds)} s`;
  const [hours, minutes] = [Math.trunc(seconds / 3600), Math.trunc(seconds / 60) % 60];
  if (hours) return minutes && hours < 10 ? `${hours} h ${minutes} min` : `${hours} h`;
  const rest = Math.trunc(seconds) % 60;
  return rest && minutes < 10 ? `${minutes} min ${rest} s` : `${minutes} min`;
}

function moment(at) {
  if (at === null) return document.createTextNode("–");
  const time = document.createElement("time");
  time.dateTime = at;
  time.title = `${at.slice(0, 19).replace("T", " ")} UTC`;
  time.textContent = "just now";
  return time;
}

function show(root, run) {
  const fill = (name, change) => root.querySelectorAll(`[data-part="${name}"]`).forEach(change);
  const text = (name, said) =>
    fill(name, (element) => {
      if (element.textContent !== said) element.textContent = said;
    });
  fill("bar", (bar) => {
    bar.max = run.total || 1;
    bar.value = run.total ? run.done : 1;
  });
  text("done", number(run.done));
  text("total", number(run.total));
  const pace = run.rate_per_s === null ? "" : `, ${number(run.rate_per_s)} per second`;
  text("pace", pace + (run.eta_s === null ? "" : `, about ${duration(run.eta_s)} left`));
  text("state", run.state);
  fill("state", (badge) => (badge.className = `badge ${KINDS[run.state]}`));
  for (const [name, at] of [["started", run.started_at], ["finished", run.finished_at]])
    fill(name, (element) => {
      if (at !== null && element.querySelector("time")?.dateTime !== at) element.replaceChildren(moment(at));
    });
  text("took", duration(run.took_s));
  fill("error", (element) => {
    element.hidden = run.error === null;
    element.textContent = run.error ?? "";
  });
  const over = run.finished_at !== null;
  if (over) fill("actions", (element) => element.remove());
  return over;
}

function follow(root) {
  const first = root.querySelector("progress").value;
  poll(root.dataset.follow, (run) => {
    // A run that makes progress is no longer blocked by an obstacle.
    if (run.done > first) document.querySelectorAll("[data-obstacle]").forEach((element) => element.remove());
    return show(root, run);
  });
}

document.querySelectorAll("[data-follow]").forEach(follow);
