// Draws the state of the page: step `here`, token `n`. `all` holds a value for every step and
// token, step after step; the names are the arguments that webpage.py gives.
const here = slider.value;
const n = Number(select.value);
const N = tokens.data.n.length;
const k = bars.data.rank.length;
const steps = Array.from({length: slider.end + 1}, (_, t) => t);
const at = (name, t, i) => all.data[name][t * N + i];
const along = (name) => steps.map((t) => at(name, t, n));
const guess = (t, i, rank) => vocabulary[guesses.data.token[(t * N + i) * k + rank]];
const probability = (t, i, rank) => guesses.data.p[(t * N + i) * k + rank];
const everyToken = (value) => Array.from({length: N}, (_, i) => value(i));
const everyRank = (value) => Array.from({length: k}, (_, rank) => value(rank));

tokens.data = {
  ...tokens.data,
  energy: everyToken((i) => at("total", here, i)),
  percent: everyToken((i) => 100 * probability(here, i, 0)),
  guess: everyToken((i) => guess(here, i, 0)),
};
chosen.data = {n: [n]};
lines.data = Object.fromEntries(
  Object.keys(lines.data).map((name) => [name, name === "step" ? steps : along(name)]),
);
marker.location = here;
bars.data = {
  rank: bars.data.rank,
  percent: everyRank((rank) => 100 * probability(here, n, rank)),
  guess: everyRank((rank) => guess(here, n, rank)),
};

const {x, y, size, low, high} = images.data;
filter.indices = [n];
mapper.low = low[n];
mapper.high = high[n];
[x_range.start, x_range.end] = [x[n], x[n] + size[n]];
[y_range.start, y_range.end] = [y[n], y[n] + size[n]];
path.data = {u: along("u"), v: along("v"), step: steps, total: along("total")};
place.data = {u: [at("u", here, n)], v: [at("v", here, n)]};

const html = (text) =>
  text.replace(/[&<>]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[c]);
const depth = here === trained ? " (the trained depth)" : "";
const energy = at("total", here, n).toFixed(2);
const percent = (100 * probability(here, n, 0)).toFixed(1);
readout.text =
  `step <b>${here}</b>${depth}, token ${n} <b>${html(tokens.data.symbol[n])}</b>: ` +
  `energy <b>${energy}</b>, next <b>${html(guess(here, n, 0))}</b> (${percent}%)`;
