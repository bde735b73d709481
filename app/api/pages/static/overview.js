// Keeps the overview fresh: fetches the page every ten seconds and swaps the part that changes. Hidden pages rest, and
// the reader may pause it. What is focused stays so, what is open stays open; only a new verdict is announced.
"use strict";
{
  const region = () => document.getElementById("overview");
  const everyMs = Number(region().dataset.refreshS) * 1000;
  const freshness = document.getElementById("freshness");
  const FOCUSABLE = "a[href], button, summary, input, [tabindex]";
  let paused = false;
  let busy = false;
  let last = Date.now();

  const pause = document.createElement("button");
  pause.type = "button";
  pause.className = "quiet";
  const say = () => {
    pause.textContent = paused ? "Go on" : "Pause";
    pause.setAttribute("aria-label", paused ? "Go on refreshing every ten seconds" : "Pause refreshing every ten seconds");
  };
  say();
  freshness.append(pause);
  pause.addEventListener("click", () => {
    paused = !paused;
    say();
    if (!paused) refresh();
  });

  // What an element is, whatever its place: when a finding appears, the fifth link is not the fifth link any more.
  const identity = (element) =>
    [element.closest("ul")?.className, element.tagName, element.getAttribute("href"), element.textContent.trim()].join(" ");

  function swap(fresh) {
    const old = region();
    const focused = old.contains(document.activeElement) ? identity(document.activeElement) : undefined;
    old.querySelectorAll("details[id][open]").forEach((element) => {
      fresh.querySelector(`#${CSS.escape(element.id)}`)?.setAttribute("open", "");
    });
    const verdict = fresh.querySelector("#verdict strong").textContent;
    if (verdict !== old.querySelector("#verdict strong").textContent) {
      document.getElementById("announcement").textContent = verdict;
    }
    old.replaceWith(fresh);
    if (focused === undefined) return;
    const again = [...fresh.querySelectorAll(FOCUSABLE)].find((element) => identity(element) === focused);
    again?.focus({ preventScroll: true });
  }

  async function refresh() {
    if (busy || paused || document.hidden) return;
    busy = true;
    const stamp = freshness.querySelector("span");
    try {
      const answer = await fetch(location.pathname, {
        headers: { Accept: "text/html" },
        cache: "no-store",
        signal: AbortSignal.timeout(everyMs),
      });
      if (answer.redirected) {
        location.reload(); // the session is over: the page itself leads to signing in
        return;
      }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("overview");
      if (!fresh) throw new Error(`no overview, but ${answer.status}`);
      swap(fresh);
      document.title = page.title;
      stamp.textContent = page.querySelector("#freshness span").textContent;
      stamp.className = "";
      last = Date.now();
    } catch {
      stamp.textContent = `Could not refresh. What you see is ${Math.round((Date.now() - last) / 1000)} s old.`;
      stamp.className = "badge bad";
    } finally {
      busy = false;
    }
  }

  setInterval(refresh, everyMs);
  document.addEventListener("visibilitychange", () => {
    if (Date.now() - last > everyMs) refresh();
  });
}
