// The rows of a run as curves: what stands on the axis, and how they are smoothed.

/** What can be on the horizontal axis. */
export const AXES = {
  step: { label: "steps", unit: "step" },
  samples: { label: "samples (trajectories)", unit: "samples" },
  hours: { label: "hours of training", unit: "h" },
};

/** Replaces all rows from step `from` on; rows stay in the order of their steps. */
export function withRows(rows, from, newer) {
  return [...rows.filter((row) => row.step < from), ...newer];
}

/**
 * The place of every row on an axis. Samples and hours are those of all training steps so far.
 * @param {Object[]} rows
 * @param {string} axis  a key of AXES
 * @returns {number[]}
 */
export function alongAxis(rows, axis) {
  if (axis === "step") return rows.map((row) => row.step);
  let sum = 0;
  return rows.map((row) => {
    const isTrained = typeof row["timing_s/step"] === "number";
    if (isTrained) sum += axis === "samples" ? row["training/num_trajectories"] ?? 0 : row["timing_s/step"] / 3600;
    return sum;
  });
}

/**
 * The curve of a metric: places and values of the rows that have it; null where it was not finite.
 * @returns {[number[], Array<number|null>]}
 */
export function curveOf(rows, metric, axis) {
  const places = alongAxis(rows, axis);
  const xs = [];
  const ys = [];
  rows.forEach((row, number) => {
    const value = row[metric];
    if (value === undefined) return;
    if (xs.length && xs[xs.length - 1] === places[number]) {
      ys[ys.length - 1] = value; // two rows at one place, such as a validation between two steps
      return;
    }
    xs.push(places[number]);
    ys.push(value);
  });
  return [xs, ys];
}

/**
 * The exponential moving average, without the pull of its beginning.
 * @param {Array<number|null>} values
 * @param {number} weight  of what came before, at least 0 and below 1
 */
export function smoothed(values, weight) {
  if (weight === 0) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

/** The names of all metrics in some rows, in alphabetical order. */
export function metricsOf(rows) {
  const names = new Set();
  for (const row of rows) for (const name of Object.keys(row)) names.add(name);
  names.delete("step");
  return [...names].sort();
}

/** The last value of a curve that is a number, or null. */
export function lastOf(values) {
  return values.findLast((value) => typeof value === "number") ?? null;
}

/** A number in the digits that a reader needs: 0.1234, 1,234, 1.2 M, 3.2e−7. */
export function figure(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return scaled(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en").replace("-", "−");
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replaceAll("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

function scaled(value) {
  const [unit, size] = Math.abs(value) >= 1e9 ? ["G", 1e9] : ["M", 1e6];
  return `${Number((value / size).toPrecision(3))} ${unit}`.replace("-", "−");
}

/** Seconds as a duration: 42 s, 12 min, 3 h 05 min, 2 d 4 h. */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "–";
  if (seconds < 99.5) return `${Number(seconds.toPrecision(2))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
