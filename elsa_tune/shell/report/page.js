"use strict";
// Figures are drawn when they are first seen: a page may hold hundreds of them.

const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return { ink: of("--ink"), line: of("--line") };
}

function dressed(layout) {
  const { ink, line } = colours();
  const worn = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, font: { color: ink, size: 12 } };
  for (const name of ["xaxis", "yaxis", ...Object.keys(layout)].filter(name => /^[xy]axis\d*$/.test(name)))
    worn[name] = { ...layout[name], gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  return worn;
}

function draw(figure) {
  const plot = figure.querySelector(".plot"), said = JSON.parse(figure.querySelector("script").textContent);
  if (said.layout.height) plot.style.height = said.layout.height + "px";
  const panels = Object.keys(said.layout).filter(name => /^xaxis\d*$/.test(name)).length;
  const width = panels > 2 ? { width: Math.max(plot.clientWidth, 170 * panels), autosize: false } : {};
  plot.dataset.drawn = "yes";
  return Plotly.react(plot, said.data, { ...dressed(said.layout), ...width }, { responsive: panels <= 2, displaylogo: false, displayModeBar: false });
}

const seen = new IntersectionObserver(entries => {
  for (const entry of entries.filter(entry => entry.isIntersecting)) {
    seen.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "200px" });

function watch() {
  for (const figure of document.querySelectorAll("figure")) seen.observe(figure);
}

function drawAgain() {
  for (const plot of document.querySelectorAll(".plot[data-drawn]")) draw(plot.closest("figure"));
}

function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}

dark.addEventListener("change", drawAgain);
addEventListener("hashchange", openTarget);
document.addEventListener("click", event => {
  if (event.target.closest("a[href^='#']")) setTimeout(openTarget);  // the address may say so already
});
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const figure of document.querySelectorAll("figure")) draw(figure);
});
watch();
openTarget();

// A page that is served while it is tuned asks for news, and takes over what is new without closing what its reader opened.

const live = document.getElementById("live");
let known = -1, missed = 0;

function row(cells, kind) {
  const line = document.createElement("tr");
  for (const text of cells) line.appendChild(document.createElement(kind)).textContent = text;
  return line;
}

function tell(news) {
  const table = document.createElement("table"), doing = document.createElement("p");
  doing.textContent = news.ended ? "Tuning has ended; this is what it found." : `${Math.round(news.left)} s left. ${news.doing}`;
  table.append(row(["family", "best ratio", "trials", "failures"], "th"));
  for (const f of news.families) table.append(row([f.family, f.best === null ? "-" : f.best.toFixed(2), `${f.trials}/${f.target}`, f.failures], "td"));
  live.replaceChildren(doing, table);
}

async function refresh() {
  const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
  const open = new Set([...document.querySelectorAll("details[open]")].map(details => details.id));
  for (const plot of document.querySelectorAll(".plot[data-drawn]")) Plotly.purge(plot);
  document.querySelector("main").replaceWith(page.querySelector("main"));
  for (const id of open) if (document.getElementById(id)) document.getElementById(id).open = true;
  watch();
}

async function ask() {
  let news;
  try {
    news = await (await fetch("/news")).json();
    missed = 0;
  } catch {
    if (++missed < 5) return setTimeout(ask, 1000);
    live.firstElementChild.textContent = "elsa-tune does not answer any more: tuning has ended, or was stopped. elsa-tune report writes what it found.";
    return;
  }
  tell(news);
  if (news.edition !== known) {
    known = news.edition;
    await refresh().catch(() => { known = -1; });
  }
  if (!news.ended) setTimeout(ask, 2000);
}

if (live) ask();
