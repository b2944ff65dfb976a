// Calls a gateway with openai-node and prints the results as one JSON document.
// Arguments: the base URL, and a data: URL of an image.
import OpenAI from "openai";

const [baseURL, image] = process.argv.slice(2);
const openai = new OpenAI({ baseURL, apiKey: "none" });
const found = {};

function error(problem) {
  return {
    name: problem.constructor.name,
    status: problem.status,
    code: problem.code,
    param: problem.param,
    type: problem.type,
  };
}

async function failing(call) {
  try {
    await call();
  } catch (problem) {
    return error(problem);
  }
  return null;
}

const prompt = "a red circle on a blue background";
const messages = [
  {
    role: "user",
    content: [
      { type: "text", text: "Describe the image." },
      { type: "image_url", image_url: { url: image } },
    ],
  },
];

const models = await openai.models.list();
found.models = models.data.map((model) => model.id);

found.image = await openai.images.generate({ prompt, model: "demonstration", size: "64x64" });

found.imageEvents = [];
for await (const event of await openai.images.generate({
  prompt,
  stream: true,
  partial_images: 2,
  num_inference_steps: 100,
})) {
  found.imageEvents.push(event);
}

found.imageError = await failing(() => openai.images.generate({ prompt, quality: "high" }));
found.editError = await failing(async () =>
  openai.images.edit({
    prompt,
    image: await OpenAI.toFile(Buffer.from(image.split(",")[1], "base64"), "a.png", {
      type: "image/png",
    }),
  }),
);

found.chat = await openai.chat.completions.create({ model: "demonstration", messages });

found.chunks = [];
for await (const chunk of await openai.chat.completions.create({
  model: "demonstration",
  messages,
  stream: true,
  stream_options: { include_usage: true },
})) {
  found.chunks.push(chunk);
}

const runner = openai.chat.completions.stream({ model: "demonstration", messages });
found.streamed = await runner.finalContent();

found.chatError = await failing(() =>
  openai.chat.completions.create({ model: "demonstration", messages, n: 2 }),
);

// A client that disconnects: the test checks that the gateway cancels the job.
const { data: stream, response } = await openai.images
  .generate({ prompt, stream: true, partial_images: 3, num_inference_steps: 200 })
  .withResponse();
for await (const _ of stream) break;
found.disconnected = response.headers.get("x-request-id");

console.log(JSON.stringify(found));
