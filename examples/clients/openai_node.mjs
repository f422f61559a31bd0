// The openai package of npm: chat, a stream, and the stream helper.
//   npm install openai
//   BASE_URL=http://127.0.0.1:8000/v1 node examples/clients/openai_node.mjs
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: "EMPTY",
});
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is the capital of France?" }];

const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
console.log("chat:", answer.choices[0].message.content);

const stream = await client.chat.completions.create({ model, messages, temperature: 0, stream: true });
let text = "";
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
console.log("stream:", text);

const helper = client.chat.completions.stream({ model, messages, temperature: 0 });
console.log("helper:", (await helper.finalChatCompletion()).choices[0].message.content);

try {
  await client.chat.completions.create({ model, messages, temperature: 9 });
} catch (error) {
  console.log("bad value:", error.status, error.param);
}
