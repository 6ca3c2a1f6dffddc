//! Plots as SVG: bars with intervals, and curves.

use std::fmt::Write as _;

use crate::statistics::Estimate;
use crate::table::number;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 260.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 50.0;
/// Where a bar's name ends and the bar begins.
const NAMES: f64 = 340.0;
const BAR: f64 = 20.0;
const COLOURS: [&str; 8] = ["#1b6ca8", "#d1495b", "#3c8d53", "#edae49", "#6a4c93", "#00798c", "#8d6a3c", "#5c5c5c"];

/// A named curve.
#[derive(Clone, Debug)]
pub(crate) struct Curve {
    /// Its name in the legend.
    pub(crate) name: String,
    /// Its points, from left to right.
    pub(crate) points: Vec<(f64, f64)>,
}

/// An axis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis<'a> {
    /// What it shows.
    pub(crate) title: &'a str,
    /// Every step is ten times the last one.
    pub(crate) logarithmic: bool,
}

/// Horizontal bars from 0, each with its interval.
pub(crate) fn bars(unit: &str, bars: &[(&str, Estimate)]) -> String {
    let most = bars.iter().map(|(_, estimate)| estimate.high).fold(f64::MIN_POSITIVE, f64::max);
    #[expect(clippy::cast_precision_loss, reason = "a few dozen bars")]
    let height = bars.len() as f64 * BAR + 10.0;
    let mut svg = open(height);
    let mut y = 5.0;
    for (name, estimate) in bars {
        let x = |value: f64| NAMES + (value.max(0.0) / most) * (WIDTH - NAMES - 120.0);
        let (end, low, high, middle) = (x(estimate.median), x(estimate.low), x(estimate.high), y + BAR / 2.0);
        let _ = write!(
            svg,
            "<text x='{:.0}' y='{:.0}' text-anchor='end'>{}</text>\
             <rect x='{NAMES}' y='{:.0}' width='{:.1}' height='{:.0}' fill='{}'/>\
             <line x1='{low:.1}' x2='{high:.1}' y1='{middle:.1}' y2='{middle:.1}' stroke='black'/>\
             <text x='{:.1}' y='{:.0}'>{} {unit}</text>",
            NAMES - 8.0,
            middle + 4.0,
            escape(name),
            y + 3.0,
            end - NAMES,
            BAR - 6.0,
            COLOURS[0],
            high + 6.0,
            middle + 4.0,
            number(estimate.median),
        );
        y += BAR;
    }
    svg + "</svg>\n"
}

/// Curves over a common pair of axes; empty if there are no points.
pub(crate) fn curves(x: Axis<'_>, y: Axis<'_>, curves: &[Curve]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (Some(horizontal), Some(vertical)) =
        (Scale::of(points().map(|point| point.0), x), Scale::of(points().map(|point| point.1), y))
    else {
        return String::new();
    };
    let at = |(a, b): (f64, f64)| {
        let (a, b) = (horizontal.place(a), vertical.place(b));
        (LEFT + a * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - b * (HEIGHT - TOP - BOTTOM))
    };
    let mut svg = open(HEIGHT);
    for tick in horizontal.ticks() {
        let (x, _) = at((tick, vertical.low));
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);
        let _ = write!(svg, "<line x1='{x:.1}' x2='{x:.1}' y1='{top}' y2='{bottom}' stroke='#ddd'/>");
        let _ = write!(svg, "<text x='{x:.1}' y='{:.0}' text-anchor='middle'>{}</text>", bottom + 16.0, short(tick));
    }
    for tick in vertical.ticks() {
        let (_, y) = at((horizontal.low, tick));
        let _ = write!(svg, "<line x1='{LEFT}' x2='{:.0}' y1='{y:.1}' y2='{y:.1}' stroke='#ddd'/>", WIDTH - RIGHT);
        let _ = write!(svg, "<text x='{:.0}' y='{:.0}' text-anchor='end'>{}</text>", LEFT - 6.0, y + 4.0, short(tick));
    }
    let _ = write!(
        svg,
        "<text x='{:.0}' y='{:.0}' text-anchor='middle'>{}</text><text x='{LEFT}' y='12'>{}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 12.0,
        escape(x.title),
        escape(y.title)
    );
    let mut legend = TOP + 10.0;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let path: Vec<String> =
            curve.points.iter().map(|point| at(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = write!(
            svg,
            "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='2'/>\
             <text x='{:.0}' y='{legend:.0}' fill='{colour}'>{}</text>",
            path.join(" "),
            WIDTH - RIGHT + 12.0,
            escape(&curve.name)
        );
        legend += 18.0;
    }
    svg + "</svg>\n"
}

/// An axis with its ends.
#[derive(Clone, Copy)]
struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Scale {
    fn of(values: impl Iterator<Item = f64>, axis: Axis<'_>) -> Option<Self> {
        let logarithmic = axis.logarithmic;
        let values = values.filter(|value| value.is_finite() && (!logarithmic || *value > 0.0));
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            return None;
        }
        if logarithmic {
            let (low, high) = (10_f64.powf(low.log10().floor()), 10_f64.powf(high.log10().ceil()));
            return Some(Self { low, high: high.max(low * 10.0), logarithmic });
        }
        Some(Self { low: 0.0, high: if high > 0.0 { high * 1.05 } else { 1.0 }, logarithmic })
    }

    /// A value's place between 0 and 1.
    fn place(&self, value: f64) -> f64 {
        let place = if self.logarithmic {
            (value.max(self.low) / self.low).log10() / (self.high / self.low).log10()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        place.clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.logarithmic {
            std::iter::successors(Some(self.low), |tick| Some(tick * 10.0))
                .take_while(|tick| *tick <= self.high * 1.01)
                .collect()
        } else {
            (0..=5).map(|step| self.low + (self.high - self.low) * f64::from(step) / 5.0).collect()
        }
    }
}

fn open(height: f64) -> String {
    format!(
        "<svg viewBox='0 0 {WIDTH:.0} {height:.0}' width='{WIDTH:.0}' height='{height:.0}' font-size='12' \
         font-family='sans-serif' xmlns='http://www.w3.org/2000/svg'>"
    )
}

fn short(value: f64) -> String {
    match value {
        value if value >= 1_000_000.0 => format!("{} M", value / 1_000_000.0),
        value if value >= 1_000.0 => format!("{} k", (value / 100.0).round() / 10.0),
        value if value >= 10.0 => format!("{value:.0}"),
        value => format!("{value:.2}"),
    }
}

/// Text inside markup.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::{Axis, Curve, curves};

    /// A plot would show points where they are not.
    #[test]
    fn curves_go_from_corner_to_corner_of_their_axes() {
        let axis = |title| Axis { title, logarithmic: true };
        let curve = Curve { name: "a & b".into(), points: vec![(1.0, 10.0), (10.0, 100.0), (100.0, 1_000.0)] };
        let svg = curves(axis("services"), axis("µs"), &[curve]);
        assert!(svg.contains("points='80.0,370.0 360.0,195.0 640.0,20.0'"), "{svg}");
        assert!(svg.contains("a &amp; b"), "{svg}");
        assert_eq!(curves(axis("x"), axis("y"), &[]), "");
    }
}
