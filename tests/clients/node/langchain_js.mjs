// npm @langchain/openai (chat and Responses), @langchain/anthropic and @langchain/langgraph.
import { ChatAnthropic } from "@langchain/anthropic";
import { tool } from "@langchain/core/tools";
import { createReactAgent } from "@langchain/langgraph/prebuilt";
import { ChatOpenAI } from "@langchain/openai";
import { z } from "zod";
import { CAPITAL, KEY, MODEL, PERSON, PLAIN, WEATHER, assert, check, equal, run } from "./harness.mjs";

const SENTENCE = "The capital of France is Paris.";
const configuration = { baseURL: `${PLAIN}/v1` };
const chat = new ChatOpenAI({ model: MODEL, apiKey: KEY, configuration, maxRetries: 0 });
const responses = new ChatOpenAI({ model: MODEL, apiKey: KEY, configuration, maxRetries: 0, useResponsesApi: true });
const claude = new ChatAnthropic({ model: MODEL, apiKey: KEY, anthropicApiUrl: PLAIN, maxRetries: 0 });
const weather = tool(async ({ city }) => `18 degrees in ${city}`, {
  name: "get_weather",
  description: "Weather.",
  schema: z.object({ city: z.string() }),
});
const Person = z.object({ name: z.string(), age: z.number().int() });

async function invoke(model) {
  equal((await model.invoke(CAPITAL)).text, SENTENCE);
}

async function stream(model) {
  let said = "";
  for await (const chunk of await model.stream(CAPITAL)) said += chunk.text;
  equal(said, SENTENCE);
}

async function tools(model) {
  equal((await model.bindTools([weather]).invoke(WEATHER)).tool_calls[0].args, { city: "Paris" });
}

async function agent(model) {
  const graph = createReactAgent({ llm: model, tools: [weather] });
  const result = await graph.invoke({ messages: [{ role: "user", content: WEATHER }] });
  equal(result.messages.at(-1).text, "It is 18 degrees and sunny in Paris.");
}

async function structured(model, method) {
  equal(await model.withStructuredOutput(Person, { name: "person", method }).invoke(PERSON), { name: "Ada", age: 36 });
}

check("chat", () => invoke(chat));
check("chat_stream", () => stream(chat));
check("chat_tools", () => tools(chat));
check("chat_agent", () => agent(chat));
check("chat_structured_by_tool", () => structured(chat, "functionCalling"));
check("chat_structured_by_schema", () => structured(chat, "jsonSchema"));
check("responses", () => invoke(responses));
check("responses_stream", () => stream(responses));
check("responses_agent", () => agent(responses));
check("messages", () => invoke(claude));
check("messages_stream", () => stream(claude));
check("messages_tools", () => tools(claude));
check("messages_agent", () => agent(claude));
check("messages_structured", () => structured(claude));
check("batch", async () => {
  const answers = await chat.batch([CAPITAL, "count to 3"]);
  assert(answers[1].text === "1 2 3");
});

await run();
