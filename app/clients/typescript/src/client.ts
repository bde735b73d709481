/** The client `Profiles`, and the decisions that it returns. */

import { ConnectionLost, DeadlineExceeded, errorOf, Invalid, ProfilesError, Unavailable } from "./errors.js";
import { newId, offsetMinutes, rfc3339, tipFeedback, tipServed } from "./events.js";
import type { Action, Time, TipEvent } from "./events.js";
import { FINGERPRINTS } from "./features.js";
import type { ProfileFeatures } from "./features.js";

const MAX_USERS = 1_000;
const MAX_EVENTS = 1_000;
const MAX_ROWS = 10_000;
const RETRIED = new Set([429, 502, 503, 504, 507]); // a proxy answers 502 and 504 for a lost connection
const BACKOFF_MS = 20;
const MAX_BACKOFF_MS = 1_000;
const HISTORY_DEADLINE_MS = 60_000;
const LONGEST_TIMER_MS = 2 ** 31 - 1; // a longer one fires at once
const ROUTES = new Set(["batch", "history"]); // `GET /profiles/batch` does not read the user called `batch`
const INVALID_ID = /^\.{1,2}$|[/\x00-\x1f\x7f-\x9f]|\p{Surrogate}/u;
const KEY = /^[!-~]([ -~]*[!-~])?$/;
const TRACEPARENT = /^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$/;

export interface ProfilesOptions {
  /** The API key. Do not give one to a browser: send its requests through a server of your own. */
  key?: string | undefined;
  /** Every call has an answer or an error after this time, retries included. Default: 1,000. */
  deadlineMs?: number | undefined;
  /** The definitions for which the types were generated: `FINGERPRINTS` of the generated module. */
  fingerprints?: Readonly<Record<string, string>> | undefined;
  /** Returns the header `traceparent` (W3C) for each request. */
  traceparent?: (() => string | undefined) | undefined;
  /** Replaces the global `fetch`. */
  fetch?: typeof fetch | undefined;
}

export interface CallOptions {
  /** Replaces the client's `deadlineMs` for this call. */
  deadlineMs?: number | undefined;
}

export interface DefaultOptions<D> extends CallOptions {
  /** Returned instead of throwing `Unavailable`. */
  default?: D;
}

export interface ReadOptions<N, D> extends DefaultOptions<D> {
  /** Only these features are read, and the type of the result has no others. Default: all features. */
  features?: readonly N[] | undefined;
}

export interface DecideOptions<D> extends DefaultOptions<D> {
  /** When the tip is shown, with the user's UTC offset. */
  at?: Time | undefined;
  /** Further features of the context that the service declares. */
  context?: Readonly<Record<string, FeatureValue>> | undefined;
  /** False: choose the tip with the highest mean score. Default: true. */
  explore?: boolean | undefined;
}

export interface HistoryOptions<N> extends CallOptions {
  features?: readonly N[] | undefined;
  /** Ignore events that arrived after this time, or, if `as_of`, after each row's own moment. */
  knownAt?: Time | "as_of" | undefined;
}

/** The value of a feature of a candidate or of the context. */
export type FeatureValue = boolean | number | string | null | undefined;

/** A tip that may be shown. A higher `priority` matters more; any scale. The service may declare further features. */
export interface Candidate {
  id: string;
  is_overdue: boolean;
  task_age_days: number;
  priority: number;
  [feature: string]: FeatureValue;
}

/** A candidate with its expected reward, and the probability with which the policy chooses it. */
export interface Ranked {
  readonly id: string;
  readonly score: number;
  readonly probability: number;
}

/**
 * What became of sent events. They are durable, and every later read reflects them. `duplicates` were stored before.
 * `invalidated` is false if the cache did not answer; reads are correct all the same.
 */
export interface Receipt {
  readonly accepted: number;
  readonly duplicates: number;
  readonly invalidated: boolean;
}

/** A row to ask for: a user and a moment, or the id of a decision, whose features are those that were served. */
export type HistoryRow = readonly [userId: string, asOf: Time] | string;

/** The rows of a training set, in the order asked for, and the features that could not be computed, with the reason. */
export interface History<F> {
  readonly rows: { readonly user_id: string; readonly as_of: string; readonly features: F }[];
  readonly failed: Readonly<Record<string, string>>;
}

interface SharedRead {
  readonly users: Set<string>;
  readonly reading: Promise<Map<string, object>>;
}

/**
 * A client of the profile service. `F` is the type of the features that `profiles features --format typescript` writes.
 *
 * A call is retried after 429, 502, 503, 504, 507 and a lost connection, for as long as its deadline allows. Then it
 * throws `Unavailable`, or returns `default`, if one is given.
 */
export class Profiles<F extends object = ProfileFeatures> {
  readonly #url: string;
  readonly #options: ProfilesOptions;
  readonly #deadlineMs: number;
  readonly #shared = new Map<string, SharedRead>();

  constructor(url: string, options: ProfilesOptions = {}) {
    const { protocol, origin, pathname, search, hash, username } = new URL(url);
    if (!/^https?:$/.test(protocol) || search || hash || username) {
      throw new TypeError(`url: must be like http://host:8000 or https://host/prefix, not ${url}`);
    }
    if (options.key !== undefined && !KEY.test(options.key)) {
      throw new TypeError("key: must be printable ASCII without surrounding blanks");
    }
    this.#url = (origin + pathname).replace(/\/+$/, "");
    this.#options = options;
    this.#deadlineMs = options.deadlineMs ?? 1_000;
    if (!(this.#deadlineMs > 0)) throw new RangeError(`deadlineMs: must be positive, not ${this.#deadlineMs}`);
  }

  /** The features of a user; of an unknown user, those without events. Reads that start together share a request. */
  async profile<N extends keyof F & string = keyof F & string, D = never>(
    user: string,
    options: ReadOptions<N, D> = {},
  ): Promise<Pick<F, N> | D> {
    checkId(user, "user_id"); // before it joins others, whose request it would spoil
    return this.#orDefault(options, async () => (await this.#share(user, options)).get(user) as Pick<F, N>);
  }

  /** The features of users, by id. More than 1,000 are read in several requests. */
  async profiles<N extends keyof F & string = keyof F & string, D = never>(
    users: Iterable<string>,
    options: ReadOptions<N, D> = {},
  ): Promise<Map<string, Pick<F, N>> | D> {
    checkSeveral(users, "user_ids");
    const asked = [...users];
    asked.forEach((user, index) => checkId(user, `user_ids[${index}]`));
    const deadline = this.#deadline(options);
    return this.#orDefault(options, () => this.#read<Pick<F, N>>([...new Set(asked)], options.features, deadline));
  }

  /**
   * Send events. Every later read reflects them. More than 1,000 are sent in several requests.
   *
   * After an error it is safe to send the same events again: the service recognizes an event by its id.
   */
  async send(events: TipEvent | Iterable<TipEvent>, options: CallOptions = {}): Promise<Receipt> {
    const deadline = this.#deadline(options);
    let total: Receipt = { accepted: 0, duplicates: 0, invalidated: true };
    for (const [start, chunk] of chunks("subject" in events ? [events] : [...events], MAX_EVENTS)) {
      const receipt = await this.#ask<Receipt>("accepted", "POST", "/events", chunk, deadline, { start });
      total = {
        accepted: total.accepted + receipt.accepted,
        duplicates: total.duplicates + receipt.duplicates,
        invalidated: total.invalidated && receipt.invalidated,
      };
    }
    return total;
  }

  /** Choose one of up to 100 tips for a user. The ranking is by score; the chosen tip is not always the first. */
  async decide<D = never>(
    user: string,
    candidates: Iterable<Candidate>,
    options: DecideOptions<D> = {},
  ): Promise<Decision | D> {
    const { at, context, explore = true } = options;
    const body = {
      user_id: user,
      request_id: newId(), // so that a retry gets the stored decision
      candidates: Array.from(candidates, ({ id, ...features }) => ({ id, features })),
      explore,
      context: { ...context, ...(at === undefined ? {} : { at: rfc3339(at) }) },
    };
    return this.#orDefault(options, async () => {
      type Score = { decision_id: string; chosen_id: string; ranking: Ranked[] };
      const score = await this.#ask<Score>("decision_id", "POST", "/score", body, this.#deadline(options));
      return new Decision(this, score.decision_id, user, score.chosen_id, score.ranking, at);
    });
  }

  /** A training set: the features of each row as of its own moment. More than 10,000 take several requests. */
  async history<N extends keyof F & string = keyof F & string>(
    rows: Iterable<HistoryRow>,
    options: HistoryOptions<N> = {},
  ): Promise<History<Pick<F, N>>> {
    checkSeveral(rows, "rows");
    const { features, knownAt, deadlineMs = HISTORY_DEADLINE_MS } = options;
    const deadline = this.#deadline({ deadlineMs });
    const asked = Array.from(rows, (row) =>
      typeof row === "string" ? { decision_id: row } : { user_id: row[0], as_of: rfc3339(row[1]) },
    );
    const known = knownAt === undefined ? {} : { known_at: rfc3339(knownAt) };
    const found: History<Pick<F, N>>["rows"] = [];
    let failed: Readonly<Record<string, string>> = {};
    for (const [start, chunk] of chunks(asked, MAX_ROWS)) {
      type Answer = { rows: typeof found; failed?: typeof failed };
      const body = { rows: chunk, ...selection(features), ...known };
      const answer = await this.#ask<Answer>("rows", "POST", "/profiles/history", body, deadline, { start });
      for (const row of answer.rows) found.push(row);
      failed = { ...failed, ...answer.failed };
    }
    return { rows: found, failed };
  }

  /**
   * How the features of the service differ from those for which the types were generated; undefined if they agree.
   * Call it when the program starts, and log the result.
   */
  async contractProblem(options: CallOptions = {}): Promise<string | undefined> {
    type Answer = { features: { name: string; fingerprint: string }[] };
    const ours = new Map(Object.entries(this.#options.fingerprints ?? FINGERPRINTS));
    const answer = await this.#ask<Answer>("features", "GET", "/features", undefined, this.#deadline(options));
    const theirs = new Map(answer.features.map(({ name, fingerprint }) => [name, fingerprint]));
    const differences = [...new Set([...ours.keys(), ...theirs.keys()])]
      .filter((name) => ours.get(name) !== theirs.get(name))
      .map((name) => `${name} is ${!theirs.has(name) ? "missing" : !ours.has(name) ? "new" : "defined differently"}`);
    if (differences.length === 0) return undefined;
    return `the service has other features than the client: ${differences.sort().join(", ")}`;
  }

  /** Read a user. All reads with equal options that begin in the same turn of the event loop share one request. */
  #share(user: string, options: ReadOptions<string, unknown>): Promise<Map<string, object>> {
    const traceparent = this.#options.traceparent?.(); // a request has one, so reads of several traces share none
    const deadline = this.#deadline(options); // before it joins others: it may be NaN
    const kind = JSON.stringify([options.features, String(options.deadlineMs), traceparent]);
    let shared = this.#shared.get(kind);
    if (shared === undefined) {
      const users = new Set<string>();
      const reading = Promise.resolve().then(() => {
        this.#shared.delete(kind);
        return this.#read([...users], options.features, deadline, traceparent);
      });
      shared = { users, reading };
      this.#shared.set(kind, shared);
    }
    shared.users.add(user);
    return shared.reading;
  }

  async #read<P extends object>(
    users: string[],
    features: readonly string[] | undefined,
    deadline: number,
    traceparent = this.#options.traceparent?.(),
  ): Promise<Map<string, P>> {
    type Profile = { user_id: string; features: P };
    type Batch = { profiles: Profile[] };
    const [first] = users;
    if (users.length === 1 && first !== undefined && !ROUTES.has(first)) {
      const query = features === undefined ? "" : `?features=${features.map(encodeURIComponent).join(",")}`;
      const path = `/profiles/${encodeURIComponent(first)}${query}`;
      const profile = await this.#ask<Profile>("features", "GET", path, undefined, deadline, { traceparent });
      return new Map([[first, profile.features]]);
    }
    const found = new Map<string, P>();
    for (const [, chunk] of chunks(users, MAX_USERS)) {
      const body = { user_ids: chunk, ...selection(features) };
      const answer = await this.#ask<Batch>("profiles", "POST", "/profiles/batch", body, deadline, { traceparent });
      for (const profile of answer.profiles) found.set(profile.user_id, profile.features);
    }
    return found;
  }

  async #orDefault<T, D>(options: DefaultOptions<D>, call: () => Promise<T>): Promise<T | D> {
    try {
      return await call();
    } catch (error) {
      if (error instanceof Unavailable && "default" in options) return options.default as D;
      throw error;
    }
  }

  #deadline({ deadlineMs = this.#deadlineMs }: CallOptions): number {
    if (Number.isNaN(deadlineMs)) throw new RangeError("deadlineMs: must be a number, not NaN");
    return performance.now() + deadlineMs;
  }

  /**
   * Send a request. After a temporary error, send it again until the deadline; then throw the last error. The answer
   * must have the field; another server may answer at the URL. `start` is the index of the body's first item in the
   * caller's list.
   */
  async #ask<T>(
    field: keyof T & string,
    method: string,
    path: string,
    body: unknown,
    deadline: number,
    { start = 0, traceparent = this.#options.traceparent?.() }: { start?: number; traceparent?: string | undefined } = {},
  ): Promise<T> {
    const headers: Record<string, string> = {};
    const request: RequestInit = { method, headers, redirect: "manual", credentials: "omit" };
    if (body !== undefined) {
      headers["Content-Type"] = "application/json";
      request.body = JSON.stringify(body);
    }
    if (this.#options.key !== undefined) headers["X-API-Key"] = this.#options.key;
    if (traceparent !== undefined && TRACEPARENT.test(traceparent)) headers["traceparent"] = traceparent;
    for (let attempt = 0; ; attempt++) {
      let pauseMs: number;
      try {
        const answer = await this.#once(path, request, deadline, start);
        if (typeof answer === "object" && answer !== null && field in answer) return answer as T;
        throw new ProfilesError(`the answer does not fit the contract: it lacks \`${field}\``);
      } catch (error) {
        if (!(error instanceof ConnectionLost || (error instanceof Unavailable && isRetried(error)))) throw error;
        const askedMs = error.retryAfterMs ?? 0;
        const spreadMs = Math.max(Math.min(BACKOFF_MS * 2 ** attempt, MAX_BACKOFF_MS), askedMs / 2);
        pauseMs = askedMs + Math.random() * spreadMs;
        if (performance.now() + pauseMs >= deadline) throw error;
      }
      await new Promise((resume) => setTimeout(resume, pauseMs));
    }
  }

  async #once(path: string, request: RequestInit, deadline: number, start: number): Promise<unknown> {
    const aborting = new AbortController();
    const leftMs = Math.min(Math.max(0, deadline - performance.now()), LONGEST_TIMER_MS);
    const timer = setTimeout(() => aborting.abort(), leftMs);
    const send = this.#options.fetch ?? fetch;
    let response: Response;
    let text: string;
    try {
      response = await send(this.#url + path, { ...request, signal: aborting.signal });
      text = await response.text();
    } catch (cause) {
      if (aborting.signal.aborted) throw new DeadlineExceeded("no answer before the deadline", { cause });
      throw new ConnectionLost(`no answer from ${this.#url}: ${reason(cause)}`, { cause });
    } finally {
      clearTimeout(timer);
    }
    if (!response.ok) throw errorOf(response, text, start);
    try {
      return JSON.parse(text) as unknown;
    } catch (cause) {
      throw new ProfilesError(`the answer is not JSON: ${text.slice(0, 200)}`, { cause });
    }
  }
}

/**
 * A decision. Report what becomes of its tip, so that the policy learns. Times default to now, with the UTC offset of
 * the decision's `at`.
 *
 * Each event is made once, so a method that is called again sends the same event.
 */
export class Decision {
  readonly #client: Pick<Profiles, "send">;
  readonly #at: Time | undefined;
  readonly #events = new Map<string, TipEvent>();

  constructor(
    client: Pick<Profiles, "send">,
    readonly id: string,
    readonly userId: string,
    readonly chosenId: string,
    readonly ranking: readonly Ranked[],
    at: Time | undefined,
  ) {
    this.#client = client;
    this.#at = at;
  }

  /** Report that the tip was shown. */
  served(options: { at?: Time | undefined } = {}): Promise<Receipt> {
    return this.#report("served", options.at, (about) => tipServed(about));
  }

  completed(options: ReportOptions = {}): Promise<Receipt> {
    return this.#react("completed", options);
  }

  dismissed(options: ReportOptions = {}): Promise<Receipt> {
    return this.#react("dismissed", options);
  }

  snoozed(options: ReportOptions = {}): Promise<Receipt> {
    return this.#react("snoozed", options);
  }

  #react(action: Action, { dwellMs, at }: ReportOptions): Promise<Receipt> {
    const dwell = dwellMs === undefined ? {} : { dwell_ms: dwellMs };
    return this.#report(action, at, (about) => tipFeedback({ ...about, action, ...dwell }));
  }

  #report(kind: string, at: Time | undefined, make: (about: DecisionEvent) => TipEvent): Promise<Receipt> {
    let event = this.#events.get(kind);
    if (event === undefined) {
      const offset = this.#at === undefined ? undefined : offsetMinutes(this.#at);
      const occurred_at = rfc3339(at ?? new Date(), offset);
      event = make({ user_id: this.userId, tip_id: this.chosenId, decision_id: this.id, occurred_at });
      this.#events.set(kind, event);
    }
    return this.#client.send(event);
  }
}

export interface ReportOptions {
  /** How long the tip was on screen. */
  dwellMs?: number | undefined;
  /** When the user reacted. Default: now. */
  at?: Time | undefined;
}

type DecisionEvent = { user_id: string; tip_id: string; decision_id: string; occurred_at: string };

function isRetried(error: Unavailable): boolean {
  return error.problem !== undefined && RETRIED.has(error.problem.status);
}

function selection(features: readonly string[] | undefined): { features?: readonly string[] } {
  return features === undefined ? {} : { features };
}

/** Throws `Invalid` if `user` is no valid id. An id with `/` or `..` would change the URL. */
function checkId(user: string, path: string): void {
  const length = typeof user === "string" ? [...user].length : 0;
  if (length > 0 && length <= 128 && !INVALID_ID.test(user)) return;
  throw invalid("Invalid id", path, "must be a string of 1 to 128 characters without control characters or `/`, and not `.` or `..`");
}

/** Throws `Invalid` if the items are a string, whose characters would be taken for ids. */
function checkSeveral(items: unknown, path: string): void {
  if (typeof items === "string") throw invalid("Invalid ids", path, "must be a list, not a string");
}

function invalid(title: string, path: string, detail: string): Invalid {
  const problem = { type: "about:blank", title, status: 422, detail, errors: [{ path, detail }] };
  return new Invalid(`${path} ${detail}`, { problem });
}

/** Lists of at most `size` items, each with the index of its first item. */
function* chunks<T>(items: readonly T[], size: number): Generator<[number, T[]]> {
  for (let start = 0; start < items.length; start += size) yield [start, items.slice(start, start + size)];
}

function reason(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  return error.cause instanceof Error ? error.cause.message : error.message;
}
