// npm @anthropic-ai/sdk: the Messages API.
import Anthropic from "@anthropic-ai/sdk";
import { CAPITAL, KEY, MODEL, PLAIN, THINKING, WEATHER, assert, check, equal, run } from "./harness.mjs";

const client = new Anthropic({ baseURL: PLAIN, apiKey: KEY, maxRetries: 0 });
const thinker = new Anthropic({ baseURL: THINKING, apiKey: KEY, maxRetries: 0 });
const SENTENCE = "The capital of France is Paris.";
const input_schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ name: "get_weather", description: "Weather.", input_schema }];
const fields = (text, more = {}) => ({
  model: MODEL,
  max_tokens: 400,
  messages: [{ role: "user", content: text }],
  ...more,
});

check("text", async () => equal((await client.messages.create(fields(CAPITAL))).content[0].text, SENTENCE));

check("stream", async () => {
  const final = await client.messages.stream(fields(CAPITAL)).finalMessage();
  equal([final.content[0].text, final.stop_reason], [SENTENCE, "end_turn"]);
});

check("tools", async () => {
  const answer = await client.messages.create(fields(WEATHER, { tools }));
  const call = answer.content.find((block) => block.type === "tool_use");
  equal([call.name, call.input, answer.stop_reason], ["get_weather", { city: "Paris" }, "tool_use"]);
});

check("tools_in_a_stream", async () => {
  const final = await client.messages.stream(fields(WEATHER, { tools })).finalMessage();
  equal(final.content.find((block) => block.type === "tool_use").input, { city: "Paris" });
});

check("tools_round_trip", async () => {
  const answer = await client.messages.create(fields(WEATHER, { tools }));
  const call = answer.content.find((block) => block.type === "tool_use");
  const messages = [
    { role: "user", content: WEATHER },
    { role: "assistant", content: answer.content },
    { role: "user", content: [{ type: "tool_result", tool_use_id: call.id, content: "18 degrees" }] },
  ];
  const last = await client.messages.create(fields("", { messages, tools }));
  equal(last.content[0].text, "It is 18 degrees and sunny in Paris.");
});

check("thinking", async () => {
  const thinking = { type: "enabled", budget_tokens: 1024 };
  const answer = await thinker.messages.create(fields(CAPITAL, { max_tokens: 2000, thinking }));
  equal(answer.content.map((block) => block.type), ["thinking", "text"]);
});

check("count_tokens", async () => {
  const counted = await client.messages.countTokens({ model: MODEL, messages: [{ role: "user", content: CAPITAL }] });
  assert(counted.input_tokens > 5);
});

check("errors", async () => {
  try {
    await client.messages.create(fields(CAPITAL, { max_tokens: -1 }));
  } catch (error) {
    equal([error.status, error.error.type], [400, "error"]);
    return;
  }
  throw new Error("taken");
});

await run();
