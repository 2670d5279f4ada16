// One whole round with the generated types: register, check in, upload, complete, see the outcome.
// Arguments: the coordinator's address and an enrolment token. Prints what became of the update.
import { createHash } from "node:crypto";
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

type Assignment = components["schemas"]["Assignment"];
const [server, token] = process.argv.slice(2) as [string, string];

function must<T>(answer: { data?: T; error?: components["schemas"]["Problem"] }): T {
  if (answer.data === undefined) throw new Error(answer.error?.code ?? "no answer");
  return answer.data;
}

// fedselect-update/1 (docs/WIRE.md) of a client that shares everything.
function updateFile(work: Assignment, values: Float32Array): Buffer {
  const mask = Buffer.alloc(Math.ceil(values.length / 8));
  const rank = Buffer.alloc(8 * (Math.ceil(values.length / 65_536) + 1));
  rank.writeBigUInt64LE(BigInt(values.length), rank.length - 8);
  const body = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  const sections: [string, string, number, Buffer][] = [
    ["block_rank", "U64", rank.length / 8, rank],
    ["values", "F32", values.length, body],
    ["mask", "U8", mask.length, mask],
  ];
  const header: Record<string, unknown> = {
    __metadata__: {
      assignment: work.id,
      base_version: work.base.sha256,
      encoding: "f32",
      examples: "20",
      format: "fedselect-update/1",
      mask_version: "1",
      round: String(work.round),
      run: work.run.id,
      space: work.space_digest,
    },
  };
  let place = 0;
  for (const [name, dtype, count, bytes] of sections) {
    header[name] = { dtype, shape: [count], data_offsets: [place, place + bytes.length] };
    place += bytes.length;
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, Buffer.from(text), ...sections.map((section) => section[3])]);
}

const nobody = createClient<paths>({ baseUrl: server });
const joined = must(
  await nobody.POST("/v1/clients", {
    params: { header: { "Idempotency-Key": crypto.randomUUID() } },
    body: { token, name: "typescript", tags: ["generated"] },
  }),
);
const client = createClient<paths>({
  baseUrl: server,
  headers: { Authorization: `Bearer ${joined.key}` },
});

async function checkIn(pending?: string) {
  return must(
    await client.POST("/v1/check-ins", {
      body: {
        ...(pending ? { pending } : {}),
        agent_version: "typescript",
        encodings: ["f32"],
        versions: [],
      },
    }),
  );
}

const wait = (seconds: number) => new Promise((go) => setTimeout(go, 1000 * seconds));
const { assignment: work } = await checkIn();
if (!work) throw new Error("there is no work");

const path = { params: { path: { version_id: work.base.id } } };
const download = must(await client.GET("/v1/versions/{version_id}/download", path));
const base = Buffer.from(await (await fetch(download.url)).arrayBuffer());
if (createHash("sha256").update(base).digest("hex") !== download.sha256) throw new Error("base");
const start = 8 + Number(base.readBigUInt64LE());
const values = new Float32Array(base.subarray(start).length / 4);
values.forEach((_, index) => (values[index] = base.readFloatLE(start + 4 * index) + 1));

const file = updateFile(work, values);
const digest = (kind: string) => createHash(kind).update(file).digest("hex");
const ticket = must(
  await client.POST("/v1/assignments/{assignment_id}/uploads", {
    params: { path: { assignment_id: work.id }, header: { "Idempotency-Key": crypto.randomUUID() } },
    body: { size: file.length, sha256: digest("sha256"), md5: digest("md5"), parts: [] },
  }),
);
if (!ticket.url) throw new Error("a small file goes in one piece");
const sent = await fetch(ticket.url, { method: "PUT", headers: ticket.headers, body: new Uint8Array(file) });
if (!sent.ok) throw new Error(await sent.text());
const upload = { params: { path: { upload_id: ticket.id } } };
let status = must(await client.POST("/v1/uploads/{upload_id}/complete", upload));
while (status.state === "uploaded") {
  await wait(0.2);
  status = must(await client.GET("/v1/uploads/{upload_id}", upload));
}
let outcome = (await checkIn(work.id)).pending;
while (outcome?.round_state === "selecting" || outcome?.round_state === "collecting" ||
       outcome?.round_state === "aggregating") {
  await wait(0.2);
  outcome = (await checkIn(work.id)).pending;
}

const refused = await client.GET("/v1/runs", {});
console.log(
  JSON.stringify({
    upload: status.state,
    round: outcome?.round_state,
    refused: refused.error?.code,
  }),
);
