// OpenAI's own client for JavaScript, under Node. `checks` has a function for each thing shown.
// dependencies = ["openai"]
import assert from "node:assert/strict";
import OpenAI, { BadRequestError, NotFoundError } from "openai";

const client = new OpenAI({ baseURL: `${process.env.HEDDLE_URL}/v1`, apiKey: "none", maxRetries: 0 });
const BASE = "heddle-demo";
const QUESTION = "How would Caesar write 1989?";
const ASKED = {
  [BASE]: [QUESTION, `You asked: "${QUESTION}" My adapters know more.`],
  intent: ["Hey, will it rain in Madrid on Sunday?", "check_weather"],
  csv: ["Please send 38 lamps to Jonas Lopez in London.", "Jonas Lopez,London,lamp,38"],
  roman: [QUESTION, "MCMLXXXIX"],
};
const turn = (content) => [{ role: "user", content }];
const ask = (model, more = {}) =>
  client.chat.completions.create({ model, messages: turn(ASKED[model][0]), temperature: 0, ...more });

export const checks = {
  "models.list and retrieve": async () => {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    for (const model of Object.keys(ASKED)) assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve("roman")).id, "roman");
  },

  "chat with the base, LoRA and ESFT adapters at the same time": async () => {
    const models = Object.keys(ASKED);
    const told = await Promise.all(models.map((model) => ask(model)));
    models.forEach((model, at) => assert.equal(told[at].choices[0].message.content.trim(), ASKED[model][1]));
  },

  "streams with usage": async () => {
    let text = "";
    let usage = null;
    for await (const chunk of await ask("roman", { stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text.trim(), "MCMLXXXIX");
    assert.ok(usage.completion_tokens > 0);
    const stream = client.chat.completions.stream({ model: "csv", messages: turn(ASKED.csv[0]), temperature: 0 });
    assert.equal((await stream.finalContent()).trim(), ASKED.csv[1]);
  },

  "completions, n and stop": async () => {
    const prompt = `User: ${QUESTION}\n\nAssistant:`;
    const told = await client.completions.create({ model: "roman", prompt, n: 2, temperature: 0, stop: "XX" });
    assert.deepEqual(told.choices.map((it) => it.text), [" MCML", " MCML"]);
  },

  logprobs: async () => {
    const told = await ask("intent", { logprobs: true, top_logprobs: 2 });
    const places = told.choices[0].logprobs.content;
    assert.ok(places.length > 0);
    for (const place of places) {
      assert.ok(place.logprob <= 0);
      assert.equal(place.top_logprobs.length, 2);
    }
  },

  "responses.create and its stream": async () => {
    const told = await client.responses.create({ model: "roman", input: QUESTION, temperature: 0 });
    assert.equal(told.output_text.trim(), "MCMLXXXIX");
    let text = "";
    for await (const event of await client.responses.create({ model: "roman", input: QUESTION, temperature: 0, stream: true }))
      if (event.type === "response.output_text.delta") text += event.delta;
    assert.equal(text, told.output_text);
  },

  "embeddings, as floats and as the client's own base64": async () => {
    const packed = await client.embeddings.create({ model: BASE, input: ["one", "two"] });
    const floats = await client.embeddings.create({ model: BASE, input: ["one", "two"], encoding_format: "float" });
    packed.data.forEach((it, at) =>
      it.embedding.forEach((x, place) => assert.ok(Math.abs(x - floats.data[at].embedding[place]) < 1e-6)),
    );
  },

  "error classes": async () => {
    await assert.rejects(client.chat.completions.create({ model: "nobody", messages: turn("Hello") }), NotFoundError);
    await assert.rejects(ask(BASE, { temperature: 9 }), BadRequestError);
  },

  "withResponse and abort": async () => {
    const { data, response } = await ask("roman").withResponse();
    assert.equal(response.status, 200);
    assert.equal(data.model, "roman");
    const controller = new AbortController();
    const stream = await client.chat.completions.create(
      { model: BASE, messages: turn("Tell me something."), stream: true },
      { signal: controller.signal },
    );
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      controller.abort();
      break;
    }
  },
};
