// Refreshes the overview: fetches the page every ten seconds and replaces the part that changes. It stops while the page
// is hidden or paused. Focus and open details are kept. Screen readers hear only a changed verdict.
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
  const label = () => {
    pause.textContent = paused ? "Resume" : "Pause";
    pause.setAttribute("aria-label", paused ? "Resume refreshing every ten seconds" : "Pause refreshing every ten seconds");
  };
  label();
  freshness.append(pause);
  pause.addEventListener("click", () => {
    paused = !paused;
    label();
    if (!paused) refresh();
  });

  // Identifies an element by its content, because a new finding changes the position of every link after it.
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
      const answer = await fetch(location.href, {
        headers: { Accept: "text/html" },
        cache: "no-store",
        signal: AbortSignal.timeout(everyMs),
      });
      if (answer.redirected) {
        location.reload(); // the session has ended: the page redirects to sign in
        return;
      }
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("overview");
      if (!fresh) throw new Error(`no overview: status ${answer.status}`);
      enhance(fresh);
      swap(fresh);
      document.title = page.title;
      stamp.replaceChildren(...page.querySelector("#freshness span").childNodes);
      enhance(stamp);
      stamp.className = "";
      last = Date.now();
    } catch {
      stamp.textContent = `Could not refresh. These figures are ${Math.round((Date.now() - last) / 1000)} s old.`;
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
