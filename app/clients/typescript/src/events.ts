/** The events that callers send. */

export type Action = "completed" | "dismissed" | "snoozed";

/** A time. Text must be RFC 3339 with a UTC offset; a `Date` gets the offset of this machine. */
export type Time = string | Date;

interface TipEventBase {
  readonly event_id: string;
  readonly user_id: string;
  readonly tip_id: string;
  readonly occurred_at: string;
  readonly decision_id?: string | undefined;
}

/** A tip was shown to a user. */
export interface TipServed extends TipEventBase {
  readonly subject: "signals.tip.served";
}

/** A user reacted to a tip. */
export interface TipFeedback extends TipEventBase {
  readonly subject: "signals.tip.feedback";
  readonly action: Action;
  readonly dwell_ms?: number | undefined;
}

export type TipEvent = TipServed | TipFeedback;

/** The fields of a new event. `occurred_at` needs the user's UTC offset, which gives the local hour; default: now. */
export interface NewEvent {
  user_id: string;
  tip_id: string;
  occurred_at?: Time | undefined;
  decision_id?: string | undefined;
  event_id?: string | undefined;
}

/** Make the event that a tip was shown. It gets its id here, so that sending it again is harmless. */
export function tipServed(fields: NewEvent): TipServed {
  return { subject: "signals.tip.served", ...completed(fields) };
}

/** Make the event that a user reacted to a tip. `dwell_ms`: how long the tip was on screen. */
export function tipFeedback(fields: NewEvent & { action: Action; dwell_ms?: number | undefined }): TipFeedback {
  return { subject: "signals.tip.feedback", ...completed(fields) };
}

function completed<T extends NewEvent>(fields: T): T & TipEventBase {
  const { occurred_at = new Date(), event_id = newId() } = fields;
  return { ...fields, event_id, occurred_at: rfc3339(occurred_at) };
}

/** 32 hexadecimal digits. Unique, not secret: Node 18 and pages without TLS lack `crypto.randomUUID`. */
export function newId(): string {
  const uuid = globalThis.crypto?.randomUUID?.();
  if (uuid !== undefined) return uuid.replaceAll("-", "");
  return Array.from({ length: 4 }, () => Math.floor(Math.random() * 2 ** 32).toString(16).padStart(8, "0")).join("");
}

/** A time as text with a UTC offset. */
export function rfc3339(time: Time, offsetMinutes?: number): string {
  if (typeof time === "string") return time;
  const offset = offsetMinutes ?? -time.getTimezoneOffset();
  const local = new Date(time.getTime() + offset * 60_000).toISOString().slice(0, -1);
  const [hours, minutes] = [Math.floor(Math.abs(offset) / 60), Math.abs(offset) % 60].map((part) =>
    String(part).padStart(2, "0"),
  );
  return `${local}${offset < 0 ? "-" : "+"}${hours}:${minutes}`;
}

/** The UTC offset of a time in minutes; undefined if it has none. */
export function offsetMinutes(time: Time): number | undefined {
  if (typeof time !== "string") return -time.getTimezoneOffset();
  const found = /(?:([+-])(\d\d):(\d\d)|Z)$/i.exec(time);
  if (found === null) return undefined;
  return (found[1] === "-" ? -1 : 1) * (Number(found[2] ?? 0) * 60 + Number(found[3] ?? 0));
}
