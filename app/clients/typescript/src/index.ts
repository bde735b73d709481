/** The client of the profile service: profiles, decisions, events and training sets. */

export * from "./client.js";
export * from "./errors.js";
export * from "./events.js";
export * from "./features.js";
