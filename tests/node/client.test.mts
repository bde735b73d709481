// What the TypeScript client promises. The environment names a service without keys (URL) and one with keys (KEYED).
import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import {
  Conflict,
  ConnectionLost,
  DeadlineExceeded,
  FINGERPRINTS,
  Invalid,
  Malformed,
  Profiles,
  ProfilesError,
  RateLimited,
  StorageFull,
  tipFeedback,
  tipServed,
  TooLarge,
  Unauthenticated,
  Unavailable,
} from "profiles-client";
import type { ProfileFeatures } from "profiles-client";

const URL_ = process.env["URL"]!;
const KEYED = process.env["KEYED"]!;
// Long enough for a busy machine. No test waits for it.
const client = new Profiles(URL_, { deadlineMs: 30_000 });
const COLD = {
  completion_rate_30d: null,
  dismiss_rate_30d: null,
  mean_dwell_ms_30d: null,
  preferred_hour: null,
  tip_volume_30d: 0,
};
const CANDIDATES = [
  { id: "t-1", is_overdue: true, task_age_days: 3.5, priority: 2 },
  { id: "t-2", is_overdue: false, task_age_days: 12, priority: 1 },
];
const TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
let users = 0;

function newUser(prefix = "user"): string {
  return `${prefix}-${process.pid}-${Date.now()}-${users++}`;
}

/** The time now, with an offset of +05:30. */
function here(agoMs = 0): string {
  return new Date(Date.now() + 330 * 60_000 - agoMs).toISOString().replace("Z", "+05:30");
}

type Answer = (response: ServerResponse, request: IncomingMessage) => void;

/** Serve the answers one after the other, and the last one from then on; the URL and the requests so far. */
async function serving(
  answers: Answer[],
  use: (url: string, requests: { headers: IncomingMessage["headers"]; body: string; atMs: number }[]) => Promise<void>,
): Promise<void> {
  const requests: { headers: IncomingMessage["headers"]; body: string; atMs: number }[] = [];
  const server = createServer((request, response) => {
    let body = "";
    request.on("data", (part: Buffer) => (body += part.toString()));
    request.on("end", () => {
      requests.push({ headers: request.headers, body, atMs: performance.now() });
      answers[Math.min(requests.length, answers.length) - 1]!(response, request);
    });
  });
  await new Promise<void>((ready) => server.listen(0, "127.0.0.1", ready));
  try {
    await use(`http://127.0.0.1:${(server.address() as AddressInfo).port}`, requests);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

function status(code: number, headers: Record<string, string> = {}, body: object = {}): Answer {
  const problem = { type: "urn:test", title: "Test", status: code, detail: "as told", ...body };
  return (response) => response.writeHead(code, headers).end(JSON.stringify(problem));
}

const profile: Answer = (response) => response.end(JSON.stringify({ user_id: "ada", features: COLD }));
const lost: Answer = (_, request) => request.socket.destroy();
const silent: Answer = () => undefined;

test("an unknown user has the defaults", async () => {
  assert.deepEqual(await client.profile(newUser()), COLD);
});

test("a selection narrows the answer and its type", async () => {
  const found = await client.profile(newUser(), { features: ["tip_volume_30d"] });
  const volume: number | null = found.tip_volume_30d;
  assert.deepEqual({ volume, found }, { volume: 0, found: { tip_volume_30d: 0 } });
  // @ts-expect-error  it was not asked for
  assert.equal(found.preferred_hour, undefined);
  const many = await client.profiles([newUser(), newUser()], { features: ["preferred_hour"] });
  for (const features of many.values()) {
    const hour: number | null = features.preferred_hour;
    assert.deepEqual({ hour, features }, { hour: null, features: { preferred_hour: null } });
  }
  // @ts-expect-error  no feature has this name
  await assert.rejects(client.profile(newUser(), { features: ["shoe_size"] }), Malformed);
});

test("a read reflects sent events", async () => {
  const user = newUser();
  const occurred_at = here();
  const about = { user_id: user, tip_id: "tip", occurred_at };
  const events = [
    tipServed(about),
    tipServed(about),
    tipFeedback({ ...about, action: "completed", dwell_ms: 1_000 }),
    tipFeedback({ ...about, action: "dismissed", dwell_ms: 3_000 }),
  ];
  assert.deepEqual(await client.send(events), { accepted: 4, duplicates: 0, invalidated: true });
  assert.deepEqual(await client.profile(user), {
    completion_rate_30d: 0.5,
    dismiss_rate_30d: 0.5,
    mean_dwell_ms_30d: 2_000,
    preferred_hour: Number(occurred_at.slice(11, 13)),
    tip_volume_30d: 2,
  });
  assert.deepEqual(await client.send(new Set(events)), { accepted: 0, duplicates: 4, invalidated: true });
});

test("a time without a zone of the user has the offset of this machine", async () => {
  const event = tipServed({ user_id: newUser(), tip_id: "tip" });
  const [whole, sign, hours, minutes] = /([+-])(\d\d):(\d\d)$/.exec(event.occurred_at)!;
  const offset = (sign === "-" ? -1 : 1) * (Number(hours) * 60 + Number(minutes));
  assert.equal(offset, -new Date().getTimezoneOffset(), whole);
  assert.ok(Math.abs(Date.parse(event.occurred_at) - Date.now()) < 10_000);
  assert.equal((await client.send(event)).accepted, 1);
});

test("every id is read as it was sent", async () => {
  const ids = ["nö", "a b", "%2F", "%", "?a=b&c#d", "😀", "a;b,c", "...", "a\\b", '"', "+", "\u00a0", "'()*!"].map(newUser);
  for (const user of [...ids, "batch", "history"]) {
    await client.send(tipServed({ user_id: user, tip_id: "tip", occurred_at: here() }));
    const { tip_volume_30d } = await client.profile(user);
    assert.ok(tip_volume_30d !== null && tip_volume_30d >= 1, user);
  }
  const many = await client.profiles(ids);
  assert.deepEqual([...many.keys()], ids);
  assert.ok([...many.values()].every((features) => features.tip_volume_30d === 1));
});

test("an id that names another route is refused before it is sent", async () => {
  for (const id of ["", ".", "..", "a/b", "a\nb", "\ud800", "x".repeat(129)]) {
    await assert.rejects(client.profile(id), (error) => error instanceof Invalid && error.issues[0]?.path === "user_id");
    await assert.rejects(
      client.profiles(["ada", "ada", id]),
      (error) => error instanceof Invalid && error.issues[0]?.path === "user_ids[2]",
    );
  }
});

test("what is no id and no list is named", async () => {
  for (const id of [undefined, null, 1] as unknown as string[]) {
    await assert.rejects(client.profile(id), (error) => error instanceof Invalid && error.issues[0]?.path === "user_id");
  }
  for (const [call, path] of [[() => client.profiles("ada"), "user_ids"], [() => client.history("ada"), "rows"]] as const) {
    await assert.rejects(call(), (error) => error instanceof Invalid && error.issues[0]?.path === path);
  }
  await assert.rejects(client.profile("ada", { deadlineMs: NaN }), RangeError);
});

test("more users and events than fit in a request take several", async () => {
  const sizes: number[] = [];
  const counting = new Profiles(URL_, {
    deadlineMs: 30_000,
    fetch: (input, init) => {
      const sent = JSON.parse(String(init!.body)) as { user_ids?: string[] };
      sizes.push((sent.user_ids ?? (sent as unknown[])).length);
      return fetch(input, init);
    },
  });
  const many = Array.from({ length: 2_500 }, () => newUser());
  const events = many.map((user_id) => tipServed({ user_id, tip_id: "tip", occurred_at: here() }));
  assert.equal((await counting.send(events)).accepted, 2_500);
  assert.equal((await counting.profiles([...many, ...many])).size, 2_500);
  assert.deepEqual(sizes, [1_000, 1_000, 500, 1_000, 1_000, 500]);
  await assert.rejects(client.send([...events.slice(0, 1_200), { ...events[0]!, tip_id: "a/b" }]), (error: unknown) => {
    assert.ok(error instanceof Invalid && error.message.includes("[1200].tip_id"));
    assert.deepEqual(error.issues.map(({ path }) => path), ["[1200].tip_id"]);
    return true;
  });
});

test("reads of one turn share a request, if they want the same", async () => {
  const paths: string[] = [];
  const counting = new Profiles(URL_, {
    deadlineMs: 30_000,
    fetch: (input, init) => {
      paths.push(new URL(String(input)).pathname);
      return fetch(input, init);
    },
  });
  const many = Array.from({ length: 50 }, () => newUser());
  const found = await Promise.all(many.map((user) => counting.profile(user)));
  assert.deepEqual(found, many.map(() => COLD));
  assert.deepEqual(paths, ["/profiles/batch"]);
  await Promise.all([counting.profile(many[0]!), counting.profile(many[0]!, { features: ["preferred_hour"] })]);
  await assert.rejects(Promise.all([counting.profile(many[0]!), counting.profile("a/b")]), Invalid);
  assert.equal(paths.length, 4);
});

test("a read keeps its own deadline when it begins together with others", async () => {
  const slow: Answer = (response, request) => request.url?.endsWith("/bob") || profile(response, request);
  await serving([slow], async (url) => {
    const impatient = new Profiles(url, { deadlineMs: 200 });
    const reads = [impatient.profile("ada", { deadlineMs: Infinity }), impatient.profile("bob")];
    reads.push(impatient.profile("ada", { deadlineMs: NaN }), impatient.profile("ada", { deadlineMs: 30_000 }));
    const ends = (await Promise.allSettled(reads)).map(({ status }) => status);
    assert.deepEqual(ends, ["fulfilled", "rejected", "rejected", "fulfilled"]);
  });
});

test("a decision reports what becomes of its tip, once", async () => {
  const user = newUser();
  const at = here();
  const decision = await client.decide(user, CANDIDATES, { at });
  assert.deepEqual(decision.ranking.map((tip) => tip.id).sort(), ["t-1", "t-2"]);
  assert.ok(decision.ranking.some((tip) => tip.id === decision.chosenId));
  assert.equal((await decision.served()).accepted, 1);
  assert.equal((await decision.completed({ dwellMs: 2_000 })).accepted, 1);
  assert.deepEqual(await decision.completed(), { accepted: 0, duplicates: 1, invalidated: true });
  assert.equal((await decision.snoozed()).accepted, 1);
  assert.equal((await decision.dismissed({ at: here() })).accepted, 1);
  const { preferred_hour, mean_dwell_ms_30d } = await client.profile(user);
  const hours = [Number(at.slice(11, 13)), Number(here().slice(11, 13))];
  assert.ok(hours.includes(preferred_hour!), `${preferred_hour} is no hour of the user: ${hours}`);
  assert.equal(mean_dwell_ms_30d, 2_000);
  const greedy = await client.decide(user, CANDIDATES, { explore: false });
  assert.equal(greedy.chosenId, greedy.ranking[0]!.id);
});

test("a training set has the features of each row's moment", async () => {
  const user = newUser();
  const before = new Date(Date.now() - 60_000);
  await client.send(tipServed({ user_id: user, tip_id: "tip", occurred_at: here(30_000) }));
  const decision = await client.decide(user, CANDIDATES);
  const asked = [[user, before], decision.id, [user, here()]] as const;
  const { rows, failed } = await client.history(asked, { features: ["tip_volume_30d"] });
  assert.deepEqual(rows.map((row) => row.features), [0, 1, 1].map((tip_volume_30d) => ({ tip_volume_30d })));
  assert.deepEqual([rows[0]!.user_id, Date.parse(rows[0]!.as_of)], [user, before.getTime()]);
  assert.deepEqual(failed, {});
  const known = await client.history([[user, here()]], { knownAt: before });
  assert.equal(known.rows[0]!.features.tip_volume_30d, 0);
});

test("a problem is an error that names each fault", async () => {
  const event = tipServed({ user_id: newUser(), tip_id: "tip", occurred_at: "yesterday" });
  await assert.rejects(client.send([event]), (error: unknown) => {
    assert.ok(error instanceof Invalid && error instanceof ProfilesError);
    assert.deepEqual([error.name, error.problem?.status, error.issues[0]?.path], ["Invalid", 422, "[0].occurred_at"]);
    assert.ok(error.requestId !== undefined && error.message.includes("occurred_at"));
    return true;
  });
  const stored = tipServed({ user_id: newUser(), tip_id: "tip", occurred_at: here() });
  await client.send(stored);
  await assert.rejects(client.send({ ...stored, tip_id: "another" }), Conflict);
  await assert.rejects(client.decide("ada", [{ ...CANDIDATES[0]!, id: "x".repeat(9_000_000) }]), TooLarge);
  await assert.rejects(new Profiles(KEYED, { deadlineMs: 30_000 }).profile("ada"), Unauthenticated);
  assert.deepEqual(await new Profiles(KEYED, { deadlineMs: 30_000, key: process.env["KEY"]! }).profile("ada"), COLD);
});

test("a default replaces Unavailable, and no other error", async () => {
  await serving([status(503, { "Retry-After": "60" })], async (url) => {
    const away = new Profiles(url, { deadlineMs: 30_000 });
    const features = await away.profile("ada", { default: null });
    const cold: ProfileFeatures | null = features;
    assert.equal(cold, null);
    assert.equal(await away.decide("ada", CANDIDATES, { default: "t-1" }), "t-1");
    assert.equal(await away.profiles(["ada"], { default: undefined }), undefined);
    await assert.rejects(away.profile("ada"), (error) => error instanceof Unavailable && error.retryAfterMs === 60_000);
    await assert.rejects(away.profile("a/b", { default: null }), Invalid);
  });
});

test("a request is sent again after errors that pass", async () => {
  const passing = [status(429), status(502), status(503), status(504), status(507), lost, lost, profile];
  await serving(passing, async (url, requests) => {
    assert.deepEqual(await new Profiles(url, { deadlineMs: 30_000 }).profile("ada"), COLD);
    assert.equal(requests.length, passing.length);
  });
  await serving([status(503), status(200, {}, { accepted: 1, duplicates: 0, invalidated: true })], async (url, requests) => {
    await new Profiles(url, { deadlineMs: 30_000 }).send(tipServed({ user_id: "ada", tip_id: "tip" }));
    assert.equal(requests[0]!.body, requests[1]!.body);
  });
});

test("other errors are not repeated", async () => {
  for (const [code, kind] of [[400, Malformed], [409, Conflict], [500, Unavailable], [301, ProfilesError]] as const) {
    await serving([status(code, { Location: "/" })], async (url, requests) => {
      await assert.rejects(new Profiles(url, { deadlineMs: 30_000 }).profile("ada"), kind);
      assert.equal(requests.length, 1, String(code));
    });
  }
});

test("an answer of another server is an error that says so", async () => {
  const page: Answer = (response) => response.end("<html>Sign in</html>");
  await serving([page], async (url) => {
    await assert.rejects(new Profiles(url, { deadlineMs: 30_000 }).profile("ada"), /the answer is not JSON: <html>/);
  });
  for (const body of [null, {}, [], "ok", { title: "Welcome" }]) {
    await serving([(response) => response.end(JSON.stringify(body))], async (url) => {
      const other = new Profiles(url, { deadlineMs: 30_000 });
      for (const call of [
        () => other.profile("ada"),
        () => other.profiles(["ada", "grace"]),
        () => other.decide("ada", CANDIDATES),
        () => other.history([["ada", new Date()]]),
        () => other.send(tipServed({ user_id: "ada", tip_id: "tip" })),
        () => other.contractProblem(),
      ]) {
        await assert.rejects(call(), (error) => error instanceof ProfilesError && /does not fit/.test(error.message));
      }
    });
  }
  await serving([(response) => response.writeHead(302, { Location: "https://sign-in.example/" }).end()], async (url) => {
    await assert.rejects(new Profiles(url).profile("ada"), /^Rejected: 302 Redirect: to https:\/\/sign-in\.example\/; /);
  });
  await serving([(response) => response.writeHead(404).end()], async (url) => {
    await assert.rejects(new Profiles(url).profile("ada"), /^NotFound: 404 Not Found: no details$/);
  });
});

test("an error of a proxy need not be a problem", async () => {
  for (const body of [{ errors: { name: ["missing"] } }, { errors: [null] }, { errors: "none" }]) {
    await serving([status(400, {}, body)], async (url, requests) => {
      await assert.rejects(new Profiles(url, { deadlineMs: 30_000 }).profile("ada"), Malformed);
      assert.equal(requests.length, 1);
    });
  }
});

test("Retry-After is honoured", async () => {
  await serving([status(503, { "Retry-After": "1" }), profile], async (url, requests) => {
    await new Profiles(url, { deadlineMs: 30_000 }).profile("ada");
    assert.ok(requests[1]!.atMs - requests[0]!.atMs >= 1_000);
  });
  const date = new Date(Date.now() + 3_600_000).toUTCString();
  await serving([status(429, { "Retry-After": date })], async (url) => {
    await assert.rejects(new Profiles(url).profile("ada"), (error: unknown) => {
      assert.ok(error instanceof RateLimited && error.retryAfterMs! > 3_000_000);
      return true;
    });
  });
  await serving([status(507, { "Retry-After": "10" })], async (url) => {
    await assert.rejects(new Profiles(url).send(tipServed({ user_id: "ada", tip_id: "tip" })), StorageFull);
  });
});

test("a call ends at its deadline", async (context) => {
  const began = performance.now();
  await serving([silent], async (url, requests) => {
    await assert.rejects(new Profiles(url).profile("ada", { deadlineMs: 50 }), DeadlineExceeded);
    assert.equal(requests.length, 1);
  });
  await serving([(response) => response.writeHead(200).write("{")], async (url) => {
    await assert.rejects(new Profiles(url, { deadlineMs: 50 }).profile("ada"), DeadlineExceeded);
  });
  // The pauses are 20, 40, 80 … 640 and 1,000 ms, so the last attempt has 740 ms until the deadline.
  context.mock.method(Math, "random", () => 1);
  await serving([lost], async (url, requests) => {
    await assert.rejects(new Profiles(url, { deadlineMs: 2_000 }).profile("ada"), ConnectionLost);
    assert.ok(requests.length > 2);
  });
  await serving([profile], async (url) => {
    assert.deepEqual(await new Profiles(url, { deadlineMs: Infinity }).profile("ada"), COLD);
  });
  assert.ok(performance.now() - began < 20_000);
});

test("the trace of the caller is passed on", async () => {
  await serving([profile], async (url, requests) => {
    await new Profiles(url, { traceparent: () => TRACE }).profile("ada");
    await new Profiles(url, { traceparent: () => "not a trace\r\nX-Evil: 1" }).profile("ada");
    await new Profiles(url, { key: "secret" }).profile("ada");
    assert.deepEqual(requests.map(({ headers }) => headers["traceparent"]), [TRACE, undefined, undefined]);
    assert.deepEqual(requests.map(({ headers }) => headers["x-api-key"]), [undefined, undefined, "secret"]);
  });
});

test("a contract that differs from the service's is noticed", async () => {
  assert.equal(await client.contractProblem(), undefined);
  const { preferred_hour: _, ...others } = FINGERPRINTS;
  const older = { ...others, tip_volume_30d: "0ld", shoe_size: "g0ne" };
  type Older = { tip_volume_30d: number | null; shoe_size: number | null };
  const problem = await new Profiles<Older>(URL_, { fingerprints: older, deadlineMs: 30_000 }).contractProblem();
  assert.equal(
    problem,
    "the service has other features than the client: preferred_hour is new, shoe_size is missing, " +
      "tip_volume_30d is defined differently",
  );
});

test("an invalid option is refused", () => {
  for (const url of ["", "localhost", "ftp://host", "http://host?a=b", "http://user@host"]) {
    assert.throws(() => new Profiles(url), TypeError, url);
  }
  assert.throws(() => new Profiles(URL_, { deadlineMs: 0 }), RangeError);
  for (const key of ["", "a\r\nX: y", "ä", " a"]) {
    assert.throws(() => new Profiles(URL_, { key }), TypeError, key);
  }
});
