// Draws the charts of the report from the data beside it, in the colours of the page.
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const drawn = new Set();

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = (index) => css(`--c${index}`);
  const fade = (hex, opacity) => hex + Math.round(opacity * 255).toString(16).padStart(2, "0");

  const axis = (spec, values) => {
    const result = {
      title: { text: spec.title, standoff: 8 },
      gridcolor: css("--grid"),
      linecolor: css("--grid"),
      zeroline: false,
      fixedrange: true,
      automargin: true,
      tickfont: { color: css("--muted") },
    };
    if (spec.format) result.tickformat = result.hoverformat = spec.format;
    else result.hoverformat = ".4~g";
    if (spec.zero) result.rangemode = "tozero";
    if (spec.range) result.range = spec.range;
    if (spec.whole) {
      const [low, high] = [Math.min(...values), Math.max(...values)];
      if (high - low < 8) result.dtick = 1;
      result.range = [low - 0.25, high + 0.25];
      result.hoverformat = "d";
    }
    return result;
  };

  // One chart's series as plotly traces.
  const traces = (chart) =>
    chart.series.flatMap((series, place) => {
      const ink = color(series.color);
      const base = { name: series.name, x: series.x, y: series.y };
      if (chart.stack) {
        const lying = chart.stack === "h";
        return [{
          ...base,
          type: "bar",
          orientation: chart.stack,
          x: lying ? series.y : series.x,
          y: lying ? series.x : series.y,
          marker: { color: ink },
          hovertemplate: `%{${lying ? "x" : "y"}:.1f} s<extra>${series.name}</extra>`,
        }];
      }
      if (chart.bars) {
        const opacity = series.faint ? 0.4 : 1;
        return [{ ...base, type: "bar", marker: { color: fade(ink, opacity) } }];
      }
      if (series.fill) {
        return [{
          ...base,
          type: "scatter",
          mode: "lines",
          line: { color: fade(ink, series.faint ? 0.45 : 1), width: series.faint ? 1 : 2, shape: "vh" },
          fill: "tozeroy",
          fillcolor: fade(ink, series.faint ? 0.03 : 0.14),
        }];
      }
      const few = series.x.length <= 12;
      const line = {
        ...base,
        type: "scatter",
        mode: few ? "lines+markers" : "lines",
        line: { color: ink, width: few ? 2.5 : 1.75 },
        marker: { color: ink, size: 7 },
      };
      if (!series.low) return [line];
      if (few) {
        // Side by side, so that two intervals at one round can both be read.
        line.x = series.x.map((at) => at + 0.05 * (place - (chart.series.length - 1) / 2));
        line.error_y = {
          type: "data",
          symmetric: false,
          array: series.high.map((high, i) => high - series.y[i]),
          arrayminus: series.low.map((low, i) => series.y[i] - low),
          color: ink,
          thickness: 1.5,
          width: 5,
        };
        return [line];
      }
      const band = {
        x: [...series.x, ...[...series.x].reverse()],
        y: [...series.high, ...[...series.low].reverse()],
        type: "scatter",
        mode: "lines",
        line: { width: 0 },
        fill: "toself",
        fillcolor: fade(ink, 0.16),
        hoverinfo: "skip",
        showlegend: false,
      };
      return [band, line];
    });

  const layout = (chart, height) => {
    const values = chart.series.flatMap((series) => series.x);
    const lying = chart.stack === "h";
    const [x, y] = [axis(chart.x, values), axis(chart.y, values)];
    if (chart.bars) x.type = "category"; // grades, not a number line
    if (lying) {
      y.autorange = "reversed"; // the first round on top
      y.title = { text: "" };
      x.title = { text: chart.y.title, standoff: 8 };
    }
    const shapes = (chart.breaks || []).map((at) => ({
      type: "line", x0: at + 0.5, x1: at + 0.5, yref: "paper", y0: 0, y1: 1,
      line: { color: css("--muted"), width: 1, dash: "dot" }, layer: "below",
    }));
    if (chart.line !== undefined) {
      shapes.push({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.line, y1: chart.line,
        line: { color: css("--muted"), width: 1.5, dash: "dash" }, layer: "below",
      });
    }
    return {
      height,
      barmode: chart.bars ? "group" : "stack",
      bargap: chart.bars ? 0.25 : 0.35,
      margin: { l: 8, r: 10, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font"), size: 12.5, color: css("--muted") },
      hovermode: chart.stack ? "closest" : "x unified",
      hoverlabel: { bgcolor: css("--surface"), bordercolor: css("--grid"), font: { color: css("--ink") } },
      dragmode: false,
      showlegend: chart.series.length > 1,
      legend: {
        orientation: "h", x: 0, xanchor: "left", y: 1.03, yanchor: "bottom",
        font: { color: css("--ink") }, traceorder: "normal",
      },
      shapes,
      xaxis: x,
      yaxis: y,
    };
  };

  const draw = (element) => {
    const chart = charts[element.dataset.chart];
    drawn.add(element);
    Plotly.react(element, traces(chart), layout(chart, element.clientHeight), { displayModeBar: false, responsive: true });
  };

  // One chart at a time, from the top, so that the page scrolls while they are drawn.
  const waiting = [...document.querySelectorAll("[data-chart]")];
  const next = () => {
    if (!waiting.length) return;
    draw(waiting.shift());
    setTimeout(next);
  };
  next();
  window.addEventListener("beforeprint", () => waiting.splice(0).forEach(draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
})();
