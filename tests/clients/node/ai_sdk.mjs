// npm ai with @ai-sdk/openai-compatible, @ai-sdk/openai (chat and Responses) and @ai-sdk/anthropic.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { CAPITAL, KEY, MODEL, PERSON, PLAIN, THINKING, WEATHER, assert, check, equal, run } from "./harness.mjs";

const SENTENCE = "The capital of France is Paris.";
const schema = z.object({ name: z.string(), age: z.number().int() });
const weather = tool({
  description: "Weather.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `18 degrees in ${city}`,
});
const compatible = createOpenAICompatible({
  name: "vecinfer",
  baseURL: `${PLAIN}/v1`,
  apiKey: KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const thinking = createOpenAICompatible({ name: "vecinfer", baseURL: `${THINKING}/v1`, apiKey: KEY });
const openai = createOpenAI({ baseURL: `${PLAIN}/v1`, apiKey: KEY });
const anthropic = createAnthropic({ baseURL: `${PLAIN}/v1`, apiKey: KEY });
const models = {
  compatible: compatible(MODEL),
  chat: openai.chat(MODEL),
  responses: openai.responses(MODEL),
  anthropic: anthropic(MODEL),
};
const base = { maxRetries: 0 };

async function text(model) {
  equal((await generateText({ ...base, model, prompt: CAPITAL })).text, SENTENCE);
}

async function stream(model) {
  let failure;
  const result = streamText({ ...base, model, prompt: CAPITAL, onError: ({ error }) => (failure = error) });
  let said = "";
  for await (const piece of result.textStream) said += piece;
  if (failure) throw failure;
  equal(said, SENTENCE);
  assert((await result.usage).outputTokens > 0, "no usage");
}

async function tools(model) {
  const fields = { ...base, model, prompt: WEATHER, tools: { get_weather: weather }, stopWhen: stepCountIs(3) };
  equal((await generateText(fields)).text, "It is 18 degrees and sunny in Paris.");
}

async function toolStream(model) {
  let failure;
  const fields = { ...base, model, prompt: WEATHER, tools: { get_weather: weather }, stopWhen: stepCountIs(3) };
  const result = streamText({ ...fields, onError: ({ error }) => (failure = error) });
  let said = "";
  for await (const piece of result.textStream) said += piece;
  if (failure) throw failure;
  equal(said, "It is 18 degrees and sunny in Paris.");
}

async function object(model) {
  equal((await generateObject({ ...base, model, schema, prompt: PERSON })).object, { name: "Ada", age: 36 });
}

check("compatible_text", () => text(models.compatible));
check("compatible_stream", () => stream(models.compatible));
check("compatible_tools", () => tools(models.compatible));
check("compatible_tool_stream", () => toolStream(models.compatible));
check("compatible_object", () => object(models.compatible));
check("compatible_reasoning", async () => {
  const result = await generateText({ ...base, model: thinking(MODEL), prompt: CAPITAL });
  assert(result.reasoningText.includes("short answer"));
  equal(result.text.trim(), SENTENCE);
});
check("compatible_object_stream", async () => {
  const result = streamObject({ ...base, model: models.compatible, schema, prompt: PERSON });
  for await (const part of result.partialObjectStream) assert(part);
  equal(await result.object, { name: "Ada", age: 36 });
});
check("chat_text", () => text(models.chat));
check("chat_stream", () => stream(models.chat));
check("chat_tools", () => tools(models.chat));
check("chat_tool_stream", () => toolStream(models.chat));
check("chat_object", () => object(models.chat));
check("responses_text", () => text(models.responses));
check("responses_stream", () => stream(models.responses));
check("responses_tools", () => tools(models.responses));
check("responses_tool_stream", () => toolStream(models.responses));
check("responses_object", () => object(models.responses));
check("anthropic_text", () => text(models.anthropic));
check("anthropic_stream", () => stream(models.anthropic));
check("anthropic_tools", () => tools(models.anthropic));
check("anthropic_tool_stream", () => toolStream(models.anthropic));
check("anthropic_object", () => object(models.anthropic));
check("embed_or_a_reason", async () => {
  try {
    assert((await embed({ ...base, model: compatible.textEmbeddingModel(MODEL), value: "Paris" })).embedding.length > 0);
  } catch (error) {
    equal(error.statusCode, 404);
  }
});

await run();
