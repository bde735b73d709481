// The features of a user, as the service serves them. Written by `profiles features --format typescript`.

export interface ProfileFeatures {
  /** Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1. */
  completion_rate_30d: number | null;
  /** Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1. */
  dismiss_rate_30d: number | null;
  /** Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known. */
  mean_dwell_ms_30d: number | null;
  /** Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days. */
  preferred_hour: number | null;
  /** How many tips the user was served over the last 30 days. */
  tip_volume_30d: number | null;
}

/** A hash of the definition of each feature. */
export const FINGERPRINTS = {
  completion_rate_30d: "4b6492ae",
  dismiss_rate_30d: "8122a968",
  mean_dwell_ms_30d: "ddcefd37",
  preferred_hour: "c2b63a09",
  tip_volume_30d: "f6c079ac",
} as const;
