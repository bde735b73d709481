/**
 * The errors of the client: one tree under `ProfilesError`.
 *
 * `Rejected`: the request must change. `Unavailable`: the same call may succeed later, and `default` replaces the error.
 */

/** One fault of a request: its place, such as `[3].occurred_at`, and the reason. */
export interface Issue {
  readonly path: string;
  readonly detail: string;
}

/** An error as the service describes it (RFC 9457). */
export interface Problem {
  readonly type: string;
  readonly title: string;
  readonly status: number;
  readonly detail: string;
  readonly errors?: readonly Issue[];
}

export interface ErrorDetails {
  problem?: Problem;
  requestId?: string | undefined;
  retryAfterMs?: number | undefined;
  cause?: unknown;
}

/** The base class of all errors. */
export class ProfilesError extends Error {
  /** Undefined if the error does not come from the service. */
  readonly problem: Problem | undefined;
  /** Finds the request in the service's log. */
  readonly requestId: string | undefined;
  readonly retryAfterMs: number | undefined;

  constructor(message: string, { problem, requestId, retryAfterMs, cause }: ErrorDetails = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    this.problem = problem;
    this.requestId = requestId;
    this.retryAfterMs = retryAfterMs;
  }

  /** Each fault of an invalid request. */
  get issues(): readonly Issue[] {
    return this.problem?.errors ?? [];
  }
}

/** The service rejected the request (4xx). Sending it again does not help. */
export class Rejected extends ProfilesError {}

/** 400: the request cannot be decoded. */
export class Malformed extends Rejected {}

/** 401: the key is missing or unknown. */
export class Unauthenticated extends Rejected {}

/** 403: the key lacks the required scope. */
export class Forbidden extends Rejected {}

/** 404: the path or the object does not exist. Check the URL of the service. */
export class NotFound extends Rejected {}

/** 409: the request contradicts stored data, such as an event id that is stored with other content. */
export class Conflict extends Rejected {}

/** 413: the body exceeds 8 MB. */
export class TooLarge extends Rejected {}

/** 422: the request is invalid. `issues` names each place and reason. */
export class Invalid extends Rejected {}

/** 503 and other 5xx, or no answer: the same call may succeed later. */
export class Unavailable extends ProfilesError {}

/** 429: the key has used up its requests for now. */
export class RateLimited extends Unavailable {}

/** 507: the service cannot store anything at the moment. Reads continue. */
export class StorageFull extends Unavailable {}

/** The connection could not be made, or broke before the answer. */
export class ConnectionLost extends Unavailable {}

/** The deadline passed before the answer. */
export class DeadlineExceeded extends Unavailable {}

type ErrorClass = new (message: string, details?: ErrorDetails) => ProfilesError;

const BY_STATUS: Readonly<Record<number, ErrorClass>> = {
  400: Malformed,
  401: Unauthenticated,
  403: Forbidden,
  404: NotFound,
  409: Conflict,
  413: TooLarge,
  422: Invalid,
  429: RateLimited,
  507: StorageFull,
};

/**
 * The error for a response that is not 2xx. Its body is a problem, or any text of a proxy. `start` is added to the first
 * index of each path.
 */
export function errorOf(response: Response, body: string, start = 0): ProfilesError {
  const { status } = response;
  const told = problemIn(response, body);
  const errors = (told.errors ?? []).map(({ path, detail }) => ({
    path: path.replace(/\[(\d+)\]/, (_, index) => `[${Number(index) + start}]`),
    detail,
  }));
  const problem = { ...told, status, errors };
  const faults = errors.map(({ path, detail }) => `; ${path}: ${detail}`).join("");
  const kind = BY_STATUS[status] ?? (status >= 500 ? Unavailable : Rejected);
  return new kind(`${status} ${problem.title}: ${problem.detail || "no details"}${faults}`, {
    problem,
    requestId: response.headers.get("x-request-id") ?? undefined,
    retryAfterMs: retryAfterMs(response.headers.get("retry-after")),
  });
}

function problemIn({ status, statusText, headers, type }: Response, body: string): Problem {
  if ((status >= 300 && status < 400) || type === "opaqueredirect") {
    const detail = `to ${headers.get("location") ?? "another address"}; give the client the URL of the service itself`;
    return { type: "about:blank", title: "Redirect", status, detail };
  }
  try {
    const found: unknown = JSON.parse(body);
    if (isProblem(found)) return found;
  } catch {
    // not JSON
  }
  return { type: "about:blank", title: statusText, status, detail: body.slice(0, 200) };
}

function isProblem(found: unknown): found is Problem {
  if (typeof found !== "object" || found === null || !("title" in found && "detail" in found)) return false;
  return !("errors" in found) || (Array.isArray(found.errors) && found.errors.every(isIssue));
}

function isIssue(found: unknown): found is Issue {
  return typeof (found as Issue | null)?.path === "string" && typeof (found as Issue).detail === "string";
}

/** Milliseconds, also if the header holds a date. */
function retryAfterMs(header: string | null): number | undefined {
  if (header === null) return undefined;
  const ms = /^\d+$/.test(header) ? Number(header) * 1000 : Date.parse(header) - Date.now();
  return Number.isNaN(ms) ? undefined : Math.max(0, ms);
}
