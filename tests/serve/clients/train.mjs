// The JavaScript client from npm as it is: what it sees of a server, as one line of JSON.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
const [modules, server, clips] = process.argv.slice(2);
const { createFalClient } = createRequire(modules + "/")("@fal-ai/client");
const fal = createFalClient({ proxyUrl: { url: server + "/api/fal/proxy", when: "always" }, suppressLocalCredentialsWarning: true });
const app = "fal-ai/stable-audio-3-trainer";
const fields = { number_of_steps: 2, rank: 4, base_precision: "fp32", duration: 2 };
const zip = new Blob([readFileSync(clips)], { type: "application/zip" });
const seen = { updates: [], logs: 0 };
const done = await fal.subscribe(app, {
  input: { ...fields, audio_data_url: zip }, logs: true,
  onQueueUpdate: (update) => { seen.updates.push(update.status); seen.logs = (update.logs ?? []).length; },
});
seen.requestId = done.requestId;
seen.lora = (await (await fetch(done.data.lora_file.url)).arrayBuffer()).byteLength;
seen.size = done.data.lora_file.file_size;
try { await fal.queue.submit(app, { input: { ...fields, audio_data_url: zip, rank: 500 } }); } catch (error) { seen.refused = [error.status, error.body.detail[0].loc]; }
try { await fal.queue.status(app, { requestId: "0".repeat(32) }); } catch (error) { seen.unknown = error.status; }
const waiting = await fal.queue.submit(app, { input: { ...fields, number_of_steps: 20000, audio_data_url: zip } });
await fal.queue.cancel(app, { requestId: waiting.request_id });
seen.streamed = [];
await fal.queue.subscribeToStatus(app, { requestId: waiting.request_id, mode: "streaming", logs: true, onQueueUpdate: (update) => seen.streamed.push(update.status) });
const large = await fal.storage.upload(new Blob([new Uint8Array(130 << 20)]));
seen.large = (await (await fetch(large)).arrayBuffer()).byteLength;
console.log(JSON.stringify(seen));
