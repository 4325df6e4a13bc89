//! The pictures: lines over two logarithmic axes, as SVG.

use std::fs;
use std::path::Path;
use std::process::Command;

use hotcell_compare::Result;
use hotcell_compare::report::Time;
use plotters::prelude::*;

use crate::schedule::Line;

const SIZE: (u32, u32) = (860, 480);
/// Told apart by colour-blind readers too (Okabe and Ito). The first is that of the first line, ours.
const COLOURS: [RGBColor; 9] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 120),
    RGBColor(150, 90, 40),
];

/// Latency over percentile, with the high percentiles spread out.
pub fn percentiles(path: &Path, title: &str, lines: &[Line]) -> Result<()> {
    let label = |x: f64| match x {
        x if x < 1.5 => "0".into(),
        x => {
            let digits = (x.log10().round() as usize).saturating_sub(2);
            format!("{:.digits$} %", 100.0 - 100.0 / x)
        }
    };
    draw(path, title, "percentile", label, lines)
}

/// Latency over the pause before the call.
pub fn gaps(path: &Path, title: &str, lines: &[Line]) -> Result<()> {
    draw(path, title, "pause before the call", |x| Time(x).to_string(), lines)
}

fn draw(
    path: &Path,
    title: &str,
    horizontal: &str,
    label: impl Fn(f64) -> String,
    lines: &[Line],
) -> Result<()> {
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let extent = |values: Vec<f64>| {
        let (least, most) = values
            .into_iter()
            .fold((f64::MAX, 1.0_f64), |(least, most), value| (least.min(value), most.max(value)));
        // Whole decades, and something to see where there is one value only.
        let least = 10_f64.powf(least.max(1.0).log10().floor());
        least..10_f64.powf(most.log10().ceil()).max(least * 10.0)
    };
    let (x, y) = (extent(points().map(|(x, _)| x).collect()), extent(points().map(|(_, y)| y).collect()));

    let whole = SVGBackend::new(path, SIZE).into_drawing_area();
    whole.fill(&WHITE)?;
    let (area, foot) = whole.split_vertically(SIZE.1 - 22);
    let grey = BLACK.mix(0.6);
    foot.draw(&Text::new(where_and_when()?, (12, 2), ("sans-serif", 12).into_font().color(&grey)))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(36) // for the half of the last label
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    let (on_x, on_y) = (|x: &f64| label(*x), |y: &f64| Time(*y).to_string());
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(horizontal)
        .y_desc("latency")
        .x_label_formatter(&on_x)
        .y_label_formatter(&on_y)
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    whole.present()?;
    Ok(())
}

/// The machine and the date, for the foot of a picture.
fn where_and_when() -> Result<String> {
    let processors = fs::read_to_string("/proc/cpuinfo")?;
    let mut models = processors.lines().filter_map(|line| {
        let (field, value) = line.split_once(':')?;
        (field.trim() == "model name").then(|| value.trim())
    });
    let model = models.next().unwrap_or("unknown processor");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    // Without what a distributor puts behind the version.
    let kernel = release.split(['-', '+']).next().unwrap_or_default();
    let date = Command::new("date").arg("+%F").output()?.stdout;
    Ok(format!(
        "{model}, {} CPUs, Linux {}, {}",
        1 + models.count(),
        kernel.trim(),
        String::from_utf8_lossy(&date).trim()
    ))
}
