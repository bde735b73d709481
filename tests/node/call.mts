// The plainest calls with the types that openapi-typescript generates. Arguments: the URL, the key and a new user.
import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

const [url, key, user] = process.argv.slice(2);
const api = createClient<paths>({ baseUrl: url!, headers: { "X-API-Key": key! } });

const batch = await api.POST("/profiles/batch", { body: { user_ids: ["ada"], features: ["tip_volume_30d"] } });
if (batch.error !== undefined) throw new Error(batch.error.detail);
const volume: number | null | undefined = batch.data.profiles[0]!.features.tip_volume_30d;

const features = { is_overdue: true, task_age_days: 3.5, priority: 2 };
const score = await api.POST("/score", { body: { user_id: "ada", candidates: [{ id: "t-1", features }] } });
if (score.error !== undefined) throw new Error(score.error.detail);
const chosen: string = score.data.chosen_id;

const path = { user_id: user! };
const detailed = await api.GET("/profiles/{user_id}/detail", { params: { path } });
const plain = await api.GET("/profiles/{user_id}", { params: { path } });
const hour: number | null | undefined = plain.data?.features.preferred_hour;
const origin: "cache" | "computed" | "unproven" | undefined = detailed.data?.features.preferred_hour?.origin;

// @ts-expect-error  the name of no feature
await api.POST("/profiles/batch", { body: { user_ids: ["ada"], features: ["shoe_size"] } });
// @ts-expect-error  the detail of a feature is in the other operation
const nowhere = plain.data?.features.preferred_hour?.origin;

console.log(JSON.stringify({ volume, chosen, hour, origin, nowhere: nowhere ?? null }));
