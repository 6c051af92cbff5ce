// The live page: follows ui/events, shows what comes, and chats. No library, nothing from elsewhere.
const POINTS = 300;             // of a chart: as many seconds
const SWATCHES = 8;             // colours of members in ui.css; later ones repeat them
const RETRY_MS = [1000, 2000, 5000, 10000];
const KEY_NAME = "moesaic-key";

const $ = (id) => document.getElementById(id);
const state = {group: null, holders: null, load: null, cursor: null, conversation: [], asking: null, following: null,
  seenAt: new Map()};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;     // so that selections and screen readers are left alone
}

const whole = new Intl.NumberFormat("en");
const memory = (bytes, unit) => unit === "GiB" ? (bytes / 2 ** 30).toFixed(1) : whole.format(Math.round(bytes / 2 ** 20));
const percent = (part) => `${Math.round(part * 100)} %`;
const times = (ratio) => ratio === null ? "–" : `${ratio.toFixed(2)} ×`;
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

// Server-sent events over fetch: a browser's EventSource sends no key.

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY_NAME);
  return key ? {...more, authorization: `Bearer ${key}`} : more;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const event = {name: "message", data: ""};
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      if (event.data) yield event;              // and no comments
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the router answered ${response.status}`;
  }
}

async function follow() {
  for (let attempt = 0; ; attempt += 1) {
    state.following = new AbortController();
    try {
      const response = await fetch("events", {headers: headers(), signal: state.following.signal, cache: "no-store"});
      if (response.status === 401 || response.status === 403) {
        askForKey(await errorOf(response));
        return;
      }
      if (!response.ok) throw new Error(await errorOf(response));
      setText($("link"), "");
      for await (const event of eventsOf(response)) {
        attempt = 0;
        if (event.name === "error") throw new Error(JSON.parse(event.data).error.message);
        SHOW[event.name]?.(JSON.parse(event.data));
      }
      throw new Error("the router ended the stream");
    } catch (error) {
      if (state.following.signal.aborted) return;
      setText($("link"), `no connection: ${error.message}`);
      $("health").className = "pill warn";
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]));
  }
}

// The group.

function showGroup(group) {
  state.group = group;
  setText($("model"), group.model);
  document.title = `${group.health} · ${group.model} · Moesaic`;
  setText($("health"), group.health);
  $("health").className = group.health === "healthy" ? "pill good" : "pill warn";
  const next = group.next_revision === null ? "" : `, revision ${group.next_revision} is prepared`;
  setText($("epoch"), group.epoch ? `epoch ${group.epoch}, revision ${group.revision}${next}` : "no epoch yet");
  setText($("why"), group.why);
  $("why").hidden = !group.why;
  showStraggler(group);
  showRows($("rows"), group.members, (member) => member.shard_id, newMemberRow, fillMemberRow);
  const more = group.num_members - group.members.length;
  setText($("more"), more > 0 ? `and ${more} more` : "");
  showChanges(group.changes);
  showRows($("routers"), group.routers, (router) => router.router_id, () => element("li"), (row, router) => setText(
    row, `${router.router_id} on ${router.node}: ${router.http_address}, ${router.is_ready ? "ready" : "not ready"}, `
    + `epoch ${router.epoch}`));
  drawMap();
}

function showStraggler(group) {
  const slow = group.members.find((member) => member.shard_id === group.straggler);
  const timed = group.members.some((member) => member.experts_over_profile !== null || member.own_over_profile !== null);
  const predicted = group.predicted_step_s === null ? "" : ` A step is planned to take ${seconds(group.predicted_step_s)}.`;
  $("straggler").className = slow ? "warn" : "soft";
  setText($("straggler"), slow ? `The others wait for ${slow.node}: ${group.straggler_reason}.`
    : timed ? `Nobody is much slower than the others.${predicted}` : `The members' work was not timed yet.${predicted}`);
}

function showRows(parent, items, keyOf, make, fill) {
  const old = new Map([...parent.children].map((row) => [row.dataset.key, row]));
  items.forEach((item, index) => {
    const key = keyOf(item);
    const row = old.get(key) ?? make(item);
    old.delete(key);
    row.dataset.key = key;
    fill(row, item);
    if (parent.children[index] !== row) parent.insertBefore(row, parent.children[index] ?? null);
  });
  for (const row of old.values()) row.remove();
}

function newMemberRow() {
  const row = element("tr");
  const name = element("th");
  name.scope = "row";
  name.append(element("span", "swatch"), element("span", "name"), element("small", "device"));
  row.append(name);
  for (const column of ["state", "memory", "kv", "load number", "share number", "experts number", "speed number",
    "profile number"]) row.append(element("td", column));
  row.querySelector(".state").append(element("span"), element("small", "detail"));
  for (const column of ["memory", "kv"]) {
    const bar = element("div", "bar");
    bar.setAttribute("aria-hidden", "true");
    bar.append(element("div"));
    row.querySelector(`.${column}`).append(element("span"), bar);
  }
  row.querySelector(".speed").append(element("span"), element("small"));
  return row;
}

function fillMemberRow(row, member) {
  row.classList.toggle("slow", member.shard_id === state.group.straggler);
  row.querySelector(".swatch").style.background = member.rank === null ? "transparent" : memberColour(member.rank);
  setText(row.querySelector(".name"), `${member.node} `);
  const emulated = member.emulated_speed === null ? "" : `, emulates ${member.emulated_speed} of its speed`;
  setText(row.querySelector(".device"), `${member.pool}: ${member.device}${emulated}`);
  const shown = row.querySelector(".state span");
  setText(shown, member.is_leaving ? `${member.state}, leaves` : member.state);
  shown.className = member.state === "failed" ? "bad" : member.state === "ready" && !member.is_leaving ? "good" : "warn";
  setText(row.querySelector(".detail"), member.detail);
  const used = member.memory_budget_bytes ? member.memory_bytes / member.memory_budget_bytes : 0;
  const unit = member.memory_budget_bytes < 10 * 2 ** 30 ? "MiB" : "GiB";
  fillBar(row.querySelector(".memory"), `${memory(member.memory_bytes, unit)} of `
    + `${memory(member.memory_budget_bytes, unit)} ${unit}`, used);
  fillBar(row.querySelector(".kv"), member.kv_part === null ? "–" : percent(member.kv_part), member.kv_part ?? 0);
  setText(row.querySelector(".load"), `${member.num_running} + ${member.num_waiting}`);
  setText(row.querySelector(".share"), percent(member.request_share));
  setText(row.querySelector(".experts"), whole.format(member.num_expert_copies));
  setText(row.querySelector(".speed span"), member.tokens_per_s ? whole.format(Math.round(member.tokens_per_s)) : "–");
  setText(row.querySelector(".speed small"), member.step_s ? `${seconds(member.step_s)} a step` : "");
  setText(row.querySelector(".profile"), member.own_over_profile === null && member.experts_over_profile === null
    ? "–" : `${times(member.own_over_profile)}, ${times(member.experts_over_profile)}`);
}

function fillBar(cell, text, part) {
  setText(cell.querySelector("span"), text);
  const bar = cell.querySelector(".bar div");
  bar.style.width = `${Math.min(part, 1) * 100}%`;
  bar.classList.toggle("over", part > 1);
}

function showChanges(changes) {
  const isFirst = !state.seenAt.size;           // when they came, the page has not seen
  for (const {key, at_s} of changes) {
    if (!state.seenAt.has(key)) state.seenAt.set(key, at_s ?? (isFirst ? 0 : Date.now() / 1000));
  }
  const newestFirst = [...changes].reverse().sort((a, b) => state.seenAt.get(b.key) - state.seenAt.get(a.key));
  showRows($("changes"), newestFirst, (change) => change.key, () => element("li"), (row, change) => {
    const at_s = state.seenAt.get(change.key);
    setText(row, `${at_s ? new Date(at_s * 1000).toLocaleTimeString() : "earlier"}: ${change.text}`);
  });
}

// The requests over time.

function newChart(title, lines, show) {
  const figure = element("figure");
  const caption = element("figcaption");
  caption.append(element("span", "", title), element("strong", "now", "–"));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${POINTS - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  for (const height of [0, 50, 100]) {
    const axis = document.createElementNS(svg.namespaceURI, "line");
    const ends = {x1: 0, x2: POINTS - 1, y1: height, y2: height, class: "axis"};
    for (const [name, value] of Object.entries(ends)) axis.setAttribute(name, value);
    svg.append(axis);
  }
  const scale = element("div", "scale soft");
  scale.setAttribute("aria-hidden", "true");
  scale.append(element("span", "", "5 min"), element("span", "top"), element("span", "", "now"));
  figure.append(caption, svg, scale);
  if (lines.length > 1) {
    const key = element("div", "soft");
    lines.forEach((name, index) => key.append(element("span", index ? "key-line second" : "key-line"), `${name}  `));
    figure.append(key);
  }
  $("charts").append(figure);
  return {figure, svg, title, lines, show, values: lines.map(() => [])};
}

function addToChart(chart, values) {
  values.forEach((value, index) => {
    chart.values[index].push(value);
    if (chart.values[index].length > POINTS) chart.values[index].shift();
  });
  const top = Math.max(...chart.values.flat().filter((value) => value !== null), 0) || 1;
  for (const line of chart.svg.querySelectorAll("polyline")) line.remove();
  chart.values.forEach((points, index) => drawLine(chart.svg, points, top, index));
  const now = values.map(chart.show).join(" / ");
  setText(chart.figure.querySelector(".now"), now);
  setText(chart.figure.querySelector(".top"), `up to ${chart.show(top)}`);
  chart.svg.setAttribute("aria-label", `${chart.title} over five minutes: now ${now}, at most ${chart.show(top)}`);
}

function drawLine(svg, points, top, index) {
  const runs = [[]];                            // a gap where there was nothing
  points.forEach((value, position) => {
    if (value === null) runs.push([]);
    else runs.at(-1).push(`${POINTS - points.length + position},${(100 - 96 * value / top).toFixed(1)}`);
  });
  for (const run of runs.filter((found) => found.length)) {
    const line = document.createElementNS(svg.namespaceURI, "polyline");
    line.setAttribute("points", run.join(" "));
    if (index) line.setAttribute("class", "second");
    svg.append(line);
  }
}

const charts = {
  tokens: newChart("Tokens a second", ["generated"], (value) => whole.format(Math.round(value))),
  ttft: newChart("Time to the first token", ["median", "95 %"], seconds),
  itl: newChart("Time between tokens", ["median", "95 %"], seconds),
};

function showRequests(requests) {
  const {rates} = requests;
  setText($("requests"), `${requests.num_held} open, ${requests.num_decoding} of them decode; `
    + `${whole.format(requests.num_waiting_tokens)} prompt tokens wait`);
  addToChart(charts.tokens, [rates.tokens_per_s]);
  addToChart(charts.ttft, [rates.ttft_p50_s, rates.ttft_p95_s]);
  addToChart(charts.itl, [rates.itl_p50_s, rates.itl_p95_s]);
}

// The heat map of experts.

function decoded(cells) {
  return Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0));
}

function showHolders(holders) {
  if (holders) {
    const bytes = decoded(holders.cells);
    holders.index = (cell) => bytes[2 * cell] + 256 * bytes[2 * cell + 1];
  }
  state.holders = holders;
  drawMap();
}

function showLoad(load) {
  if (load) load.bytes = decoded(load.cells);
  state.load = load;
  drawMap();
}

const memberColour = (rank) => colourOf(`--m${rank % SWATCHES}`);

function nodeOf(rank) {
  return state.group?.members.find((member) => member.rank === rank)?.node ?? `rank ${rank}`;
}

function cellSize(holders) {
  const width = Math.floor(($("map-box").clientWidth || 300) / holders.num_experts);
  return {width: Math.max(4, Math.min(width, 40)), height: Math.max(5, Math.min(18, Math.floor(420 / holders.num_layers)))};
}

function drawMap() {
  const holders = state.holders;
  $("experts").hidden = !holders;
  if (!holders) return;
  const {width, height} = cellSize(holders), ratio = devicePixelRatio || 1, canvas = $("map");
  canvas.width = width * holders.num_experts * ratio;
  canvas.height = height * holders.num_layers * ratio;
  canvas.style.width = `${width * holders.num_experts}px`;
  canvas.style.height = `${height * holders.num_layers}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const byLoad = new FormData($("colours")).get("colour") === "load";
  const paint = byLoad ? loadPainter() : memberPainter();
  const gap = width > 6 && height > 6 ? 1 : 0;
  for (let layer = 0; layer < holders.num_layers; layer += 1) {
    for (let expert = 0; expert < holders.num_experts; expert += 1) {
      paint(context, layer * holders.num_experts + expert, expert * width, layer * height, width - gap, height - gap);
    }
  }
  if (state.cursor) {
    context.strokeStyle = colourOf("--cursor");
    context.lineWidth = 2;
    context.strokeRect(state.cursor.expert * width, state.cursor.layer * height, width, height);
  }
  showLegend(byLoad);
}

function memberPainter() {
  const colours = new Map();
  const colour = (rank) => colours.get(rank) ?? colours.set(rank, memberColour(rank)).get(rank);
  return (context, cell, x, y, width, height) => {
    const ranks = state.holders.sets[state.holders.index(cell)];
    ranks.forEach((rank, index) => {
      context.fillStyle = colour(rank);
      context.fillRect(x + width * index / ranks.length, y, width / ranks.length, height);
    });
  };
}

function loadPainter() {
  const stops = ["--heat-low", "--heat-mid", "--heat-high"].map((name) => rgb(colourOf(name)));
  const ramp = Array.from({length: 256}, (_, step) => {
    const part = Math.min(Math.log2(1 + step / 32) / Math.log2(9), 1) * 2;      // 8 times the mean is the end
    const [from, way] = part < 1 ? [0, part] : [1, part - 1];
    return `rgb(${stops[from].map((low, index) => Math.round(low + (stops[from + 1][index] - low) * way)).join()})`;
  });
  return (context, cell, x, y, width, height) => {
    context.fillStyle = ramp[state.load?.bytes[cell] ?? 0];
    context.fillRect(x, y, width, height);
  };
}

function rgb(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

function showLegend(byLoad) {
  const legend = $("legend");
  const ranks = [...new Set(state.holders.sets.flat())].sort((a, b) => a - b);
  const key = byLoad ? `load ${state.load?.is_counted}` : ranks.map(nodeOf).join();
  if (legend.dataset.key === key) return;
  legend.dataset.key = key;
  legend.replaceChildren();
  if (byLoad) {
    const ramp = element("span");
    ramp.append("idle", element("span", "ramp"), "8 × the mean of its layer");
    legend.append(state.load?.is_counted ? ramp : "No rows were counted yet.");
    return;
  }
  for (const rank of ranks.slice(0, 24)) {
    const entry = element("span");
    const swatch = element("span", "swatch");
    swatch.style.background = memberColour(rank);
    entry.append(swatch, nodeOf(rank));
    legend.append(entry);
  }
  legend.append(ranks.length > SWATCHES ? "Colours repeat; a cell with several has copies." : "A cell with several has copies.");
}

function moveTo(layer, expert) {
  const holders = state.holders;
  if (!holders) return;
  state.cursor = {layer: Math.max(0, Math.min(layer, holders.num_layers - 1)),
    expert: Math.max(0, Math.min(expert, holders.num_experts - 1))};
  const cell = state.cursor.layer * holders.num_experts + state.cursor.expert;
  const nodes = holders.sets[holders.index(cell)].map(nodeOf).join(", ");
  const rows = state.load?.is_counted ? `; ${(state.load.bytes[cell] / state.load.steps).toFixed(2)} × the layer's mean load` : "";
  setText($("cell"), `MoE layer ${state.cursor.layer}, expert ${state.cursor.expert}: on ${nodes}${rows}`);
  drawMap();
}

$("map").addEventListener("pointermove", (event) => {
  if (!state.holders) return;
  const {width, height} = cellSize(state.holders);
  moveTo(Math.floor(event.offsetY / height), Math.floor(event.offsetX / width));
});
$("map").addEventListener("keydown", (event) => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  const from = state.cursor;
  moveTo(from ? from.layer + step[0] : 0, from ? from.expert + step[1] : 0);
});
$("colours").addEventListener("change", drawMap);
addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.group && showGroup(state.group));

// The chat.

function addMessage(who) {
  const article = element("article");
  const thinking = element("div", "thinking"), content = element("div");
  thinking.hidden = true;
  article.append(element("h3", "", who), thinking, content);
  $("chat").append(article);
  return {article, thinking, content};
}

async function ask(question) {
  state.conversation.push({role: "user", content: question});
  addMessage("You").content.textContent = question;
  const answer = addMessage(state.group?.model ?? "Model");
  answer.article.setAttribute("aria-busy", "true");
  state.asking = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const began = performance.now();
  let first = null, numTokens = 0, text = "";
  try {
    const response = await fetch("../v1/chat/completions", {
      method: "POST", headers: headers({"content-type": "application/json"}), signal: state.asking.signal,
      body: JSON.stringify({model: state.group?.model, messages: state.conversation, stream: true,
        stream_options: {include_usage: true, continuous_usage_stats: true}})});
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const event of eventsOf(response)) {
      if (event.data === "[DONE]") break;
      const chunk = JSON.parse(event.data);
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {};
      numTokens = chunk.usage?.completion_tokens ?? numTokens;
      if (delta.reasoning_content) {
        answer.thinking.hidden = false;
        answer.thinking.append(delta.reasoning_content);
      }
      text += delta.content ?? "";
      if (delta.content) answer.content.append(delta.content);
      if (first === null && (delta.content || delta.reasoning_content)) first = performance.now();
      $("chat").scrollTop = $("chat").scrollHeight;
    }
    const took = (performance.now() - (first ?? began)) / 1000;
    setText($("pace"), first === null ? "" : `${numTokens} tokens, the first after ${seconds((first - began) / 1000)}`
      + (numTokens > 1 && took > 0 ? `, then ${((numTokens - 1) / took).toFixed(1)} tokens/s` : ""));
  } catch (error) {
    const why = state.asking.signal.aborted ? "stopped" : error.message;
    answer.content.append(element("div", state.asking.signal.aborted ? "soft" : "bad", `(${why})`));
  }
  if (text) state.conversation.push({role: "assistant", content: text});
  else state.conversation.pop();
  answer.article.removeAttribute("aria-busy");
  $("send").disabled = false;
  $("stop").disabled = true;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || $("send").disabled) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.asking?.abort());
$("clear").addEventListener("click", () => {
  state.asking?.abort();
  state.conversation = [];
  $("chat").replaceChildren();
  setText($("pace"), "");
});

// The key.

function askForKey(why) {
  $("key").hidden = false;
  setText($("health"), "no access");
  $("health").className = "pill warn";
  setText($("key-why"), `${why} Use one with the scope status; to chat as well, admin or also infer. It stays in this tab.`);
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

function restart() {
  $("key-dialog").close();
  $("key").hidden = !sessionStorage.getItem(KEY_NAME);
  state.following?.abort();
  follow();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY_NAME, $("key-text").value.trim());
  $("key-text").value = "";
  restart();
});
$("key-forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY_NAME);
  restart();
});
$("key").addEventListener("click", () => $("key-dialog").showModal());
$("key").hidden = !sessionStorage.getItem(KEY_NAME);

const SHOW = {group: showGroup, requests: showRequests, holders: showHolders, load: showLoad};
follow();
