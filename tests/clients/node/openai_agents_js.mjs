// npm @openai/agents, over chat completions and over Responses.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run as execute, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";
import { CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, check, equal, run } from "./harness.mjs";

setTracingDisabled(true);
const client = new OpenAI({ baseURL: `${PLAIN}/v1`, apiKey: KEY, maxRetries: 0 });
const chat = new OpenAIChatCompletionsModel(client, MODEL);
const responses = new OpenAIResponsesModel(client, MODEL);
const weather = tool({
  name: "get_weather",
  description: "Weather.",
  parameters: z.object({ city: z.string() }),
  execute: async ({ city }) => `18 degrees in ${city}`,
});
const outputType = z.object({ name: z.string(), age: z.number().int() });

async function final(model, prompt, fields = {}) {
  const agent = new Agent({ name: "helper", instructions: "Be brief.", model, ...fields });
  return (await execute(agent, prompt)).finalOutput;
}

async function streamed(model, prompt, fields = {}) {
  const agent = new Agent({ name: "helper", instructions: "Be brief.", model, ...fields });
  const result = await execute(agent, prompt, { stream: true });
  await result.completed;
  return result.finalOutput;
}

check("chat", async () => equal(await final(chat, CAPITAL), "The capital of France is Paris."));
check("chat_stream", async () => equal(await streamed(chat, CAPITAL), "The capital of France is Paris."));
check("chat_tools", async () =>
  equal(await final(chat, WEATHER, { tools: [weather] }), "It is 18 degrees and sunny in Paris."));
check("chat_tools_stream", async () =>
  equal(await streamed(chat, WEATHER, { tools: [weather] }), "It is 18 degrees and sunny in Paris."));
check("chat_output", async () => equal(await final(chat, PERSON, { outputType }), { name: "Ada", age: 36 }));
check("responses", async () => equal(await final(responses, CAPITAL), "The capital of France is Paris."));
check("responses_stream", async () => equal(await streamed(responses, CAPITAL), "The capital of France is Paris."));
check("responses_tools", async () =>
  equal(await final(responses, WEATHER, { tools: [weather] }), "It is 18 degrees and sunny in Paris."));
check("responses_tools_stream", async () =>
  equal(await streamed(responses, WEATHER, { tools: [weather] }), "It is 18 degrees and sunny in Paris."));
check("responses_output", async () => equal(await final(responses, PERSON, { outputType }), { name: "Ada", age: 36 }));

await run();
