"use strict";
const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Plots: drawn when they come into view.
let figures = [];
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "400px" });
function draw(place) {
  const figure = figures[Number(place.dataset.figure)];
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line") };
  const own = figure.layout;
  if (own.height) place.style.height = own.height + "px";
  const layout = {
    ...own, margin: { l: 46, r: 12, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), size: 11 }, xaxis: { ...axis, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis },
    legend: { orientation: "h", y: 1.12, font: { size: 10 } }, autosize: true,
  };
  Plotly.newPlot(place, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  place.dataset.drawn = "yes";
}
function start() {
  figures = JSON.parse(byId("figures").textContent);
  document.querySelectorAll(".canvas").forEach((place) => seen.observe(place));
  document.querySelectorAll("[data-gallery]").forEach(filter);
}

addEventListener("beforeprint", () => document.querySelectorAll(".canvas:not([data-drawn])").forEach(draw));

// Gallery: filters, and how many are shown.
const STEP = 24;
function filter(gallery) {
  const show = gallery.querySelector("[aria-pressed=true]")?.dataset.show || "all";
  const skill = gallery.querySelector("select[data-skill]")?.value || "";
  const words = (gallery.querySelector("input[type=search]")?.value || "").toLowerCase();
  const limit = Number(gallery.dataset.limit || STEP);
  let found = 0;
  for (const card of gallery.querySelectorAll(".card")) {
    const fits = (show === "all" || card.dataset[show] === "yes") && (!skill || card.dataset.skill === skill)
      && (!words || card.dataset.prompt.toLowerCase().includes(words));
    found += fits;
    card.hidden = !fits || found > limit;
  }
  gallery.querySelector(".found").textContent = found === 1 ? "1 prompt" : `${found} prompts`;
  const more = gallery.querySelector(".more");
  more.hidden = found <= limit;
  more.textContent = `Show all ${found}`;
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const gallery = button.closest("[data-gallery]");
  if (button.dataset.show) {
    gallery.querySelectorAll("[data-show]").forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    filter(gallery);
  } else if (button.classList.contains("more")) {
    gallery.dataset.limit = "100000"; filter(gallery);
  } else if (button.dataset.copy) {
    copy(button);
  } else if (button.classList.contains("cell")) {
    compare(button);
  } else if (button.dataset.close !== undefined) {
    button.closest("dialog").close();
  }
});
document.addEventListener("input", (event) => {
  const gallery = event.target.closest("[data-gallery]");
  if (event.target.dataset.sort !== undefined) sort(gallery, event.target.value);
  if (gallery) filter(gallery);
  if (event.target.id === "slide") slide();
});
function sort(gallery, rule) {
  const cards = gallery.querySelector(".cards");
  const [key, order] = rule.split(" ");
  const value = (card) => (card.dataset[key] === undefined || card.dataset[key] === "" ? -Infinity : Number(card.dataset[key]));
  const sorted = [...cards.children].sort((a, b) => (order === "up" ? value(a) - value(b) : value(b) - value(a)));
  cards.append(...sorted);
}
async function copy(button) {
  const text = byId(button.dataset.copy).textContent;
  try { await navigator.clipboard.writeText(text); } catch {
    const range = document.createRange(); range.selectNodeContents(byId(button.dataset.copy));
    getSelection().removeAllRanges(); getSelection().addRange(range); document.execCommand("copy");
  }
  button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// Before and after, with a slider: the clicked image over the first of its row.
function compare(button) {
  const cells = [...button.closest(".card").querySelectorAll(".cell")];
  const last = button === cells[0] ? cells[cells.length - 1] : button;
  byId("compare-prompt").textContent = button.closest(".card").dataset.prompt;
  for (const [side, cell] of [["before", cells[0]], ["after", last]]) {
    byId(side).src = cell.querySelector("img").src;
    byId(side).alt = cell.getAttribute("aria-label");
    byId(side + "-name").textContent = cell.getAttribute("aria-label");
  }
  byId("slide").value = 50; slide();
  byId("compare").showModal(); byId("slide").focus();
}
function slide() {
  const at = byId("slide").value;
  byId("after").style.clipPath = `inset(0 0 0 ${at}%)`;
  byId("edge").style.left = `${at}%`;
}

// A live page asks for a new version and takes over the sections that differ, or shows what the server has to say.
async function answered(address) {
  const answer = await fetch(address).catch(() => { throw new Error("the server has stopped"); });
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return answer;
}
async function follow(address) {
  let known = null;
  for (;;) {
    try {
      const news = await (await answered(address)).json();
      byId("live").textContent = "live";
      if (known !== null && news.version !== known) await refresh();
      known = news.version;
    } catch (error) { byId("live").textContent = error.message; }
    await new Promise((done) => setTimeout(done, 1500));
  }
}
async function refresh() {
  const part = new URL(location.href);
  part.hash = "";
  part.searchParams.set("part", "1");
  const fresh = new DOMParser().parseFromString(await (await answered(part)).text(), "text/html");
  byId("figures").textContent = fresh.getElementById("figures").textContent;
  for (const section of fresh.querySelectorAll("main > section")) {
    const old = byId(section.id);
    if (old && old.dataset.digest !== section.dataset.digest) old.replaceWith(section);
  }
  start();
}
start();
if (document.body.dataset.live) follow(document.body.dataset.live);
