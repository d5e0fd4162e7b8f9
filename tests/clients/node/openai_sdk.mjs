// npm openai: chat completions, tools, structured output, Responses, embeddings.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, WEATHERS, assert, check, equal, run } from "./harness.mjs";

const client = new OpenAI({ baseURL: `${PLAIN}/v1`, apiKey: KEY, maxRetries: 0 });
const thinker = new OpenAI({ baseURL: `${THINKING}/v1`, apiKey: KEY, maxRetries: 0 });
const SENTENCE = "The capital of France is Paris.";
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "Weather.", parameters } }];
const Person = z.object({ name: z.string(), age: z.number().int() });
const ask = (text, fields = {}, using = client) =>
  using.chat.completions.create({ model: MODEL, messages: [{ role: "user", content: text }], ...fields });

check("chat", async () => equal((await ask(CAPITAL)).choices[0].message.content, SENTENCE));

check("stream", async () => {
  let said = "";
  for await (const chunk of await ask(CAPITAL, { stream: true })) said += chunk.choices[0]?.delta?.content ?? "";
  equal(said, SENTENCE);
});

check("stream_helper", async () => {
  const stream = client.chat.completions.stream({ model: MODEL, messages: [{ role: "user", content: CAPITAL }] });
  equal((await stream.finalChatCompletion()).choices[0].message.content, SENTENCE);
});

check("tools", async () => {
  const answer = await ask(WEATHERS, { tools });
  const cities = answer.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments).city);
  equal(cities, ["Paris", "Rome"]);
  equal(answer.choices[0].finish_reason, "tool_calls");
});

check("tools_in_a_stream", async () => {
  const messages = [{ role: "user", content: WEATHER }];
  const final = await client.chat.completions.stream({ model: MODEL, messages, tools }).finalChatCompletion();
  equal(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), { city: "Paris" });
});

check("run_tools", async () => {
  const runnable = { ...tools[0].function, parse: JSON.parse, function: ({ city }) => `18 degrees in ${city}` };
  const messages = [{ role: "user", content: WEATHER }];
  const runner = client.chat.completions.runTools({
    model: MODEL,
    messages,
    tools: [{ type: "function", function: runnable }],
  });
  equal(await runner.finalContent(), "It is 18 degrees and sunny in Paris.");
});

check("tool_choice_required", async () => {
  const call = (await ask(CAPITAL, { tools, tool_choice: "required" })).choices[0].message.tool_calls[0];
  assert("city" in JSON.parse(call.function.arguments));
});

check("json_object", async () => {
  JSON.parse((await ask(PERSON, { response_format: { type: "json_object" } })).choices[0].message.content);
});

check("parse_helper", async () => {
  const answer = await client.chat.completions.parse({
    model: MODEL,
    messages: [{ role: "user", content: PERSON }],
    response_format: zodResponseFormat(Person, "person"),
  });
  equal(answer.choices[0].message.parsed, { name: "Ada", age: 36 });
});

check("reasoning", async () => {
  const message = (await ask(CAPITAL, {}, thinker)).choices[0].message;
  assert(message.reasoning_content.includes("short answer"));
  equal(message.content.trim(), SENTENCE);
});

check("responses", async () => {
  equal((await client.responses.create({ model: MODEL, input: CAPITAL })).output_text, SENTENCE);
});

check("responses_stream", async () => {
  const final = await client.responses.stream({ model: MODEL, input: CAPITAL }).finalResponse();
  equal(final.output_text, SENTENCE);
});

check("responses_tools", async () => {
  const tool = { type: "function", name: "get_weather", description: "Weather.", parameters, strict: false };
  const input = [{ role: "user", content: WEATHER }];
  const answer = await client.responses.create({ model: MODEL, input, tools: [tool] });
  const call = answer.output.find((item) => item.type === "function_call");
  equal(JSON.parse(call.arguments), { city: "Paris" });
  input.push(...answer.output, { type: "function_call_output", call_id: call.call_id, output: "18 degrees" });
  const last = await client.responses.create({ model: MODEL, input, tools: [tool] });
  equal(last.output_text, "It is 18 degrees and sunny in Paris.");
});

check("responses_parse", async () => {
  const answer = await client.responses.parse({
    model: MODEL,
    input: PERSON,
    text: { format: zodTextFormat(Person, "person") },
  });
  equal(answer.output_parsed, { name: "Ada", age: 36 });
});

check("models", async () => {
  assert((await client.models.list()).data.some((model) => model.id === MODEL));
});

check("embeddings_or_a_reason", async () => {
  try {
    const answer = await client.embeddings.create({ model: MODEL, input: "Paris" });
    assert(answer.data[0].embedding.length > 0);
  } catch (error) {
    equal(error.status, 404);
    assert(/embedding_model/.test(error.message), error.message);
  }
});

check("errors", async () => {
  try {
    await ask(CAPITAL, { model: "no such model" });
  } catch (error) {
    equal(error.status, 404);
    return;
  }
  throw new Error("taken");
});

await run();
