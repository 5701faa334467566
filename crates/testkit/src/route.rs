//! Vehicles that drive along plausible routes: the same seed, the same drive.

/// A small generator of pseudo-random numbers (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that gives the same numbers for the same seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 up to, not including, 1.
    #[allow(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
    pub fn fraction(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A number between two others.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.fraction()
    }
}

/// A city and a loop of streets around its middle, as degrees north and east.
struct City {
    altitude_m: f64,
    points: &'static [(f64, f64)],
}

/// Loops of 8 to 30 km, roughly along big roads.
const CITIES: &[City] = &[
    // Berlin
    City {
        altitude_m: 38.0,
        points: &[
            (52.5163, 13.3777),
            (52.5219, 13.4132),
            (52.5290, 13.4550),
            (52.5100, 13.4860),
            (52.4850, 13.4690),
            (52.4730, 13.4250),
            (52.4840, 13.3850),
            (52.4760, 13.3350),
            (52.4960, 13.2900),
            (52.5070, 13.2790),
            (52.5250, 13.3140),
            (52.5350, 13.3430),
        ],
    },
    // Vilnius
    City {
        altitude_m: 112.0,
        points: &[
            (54.6872, 25.2797),
            (54.6958, 25.2900),
            (54.7150, 25.2920),
            (54.7260, 25.2650),
            (54.7170, 25.2270),
            (54.6980, 25.2080),
            (54.6760, 25.2260),
            (54.6650, 25.2550),
            (54.6700, 25.2830),
        ],
    },
    // Madrid
    City {
        altitude_m: 660.0,
        points: &[
            (40.4168, -3.7038),
            (40.4300, -3.6880),
            (40.4520, -3.6900),
            (40.4720, -3.6820),
            (40.4660, -3.6480),
            (40.4350, -3.6450),
            (40.4080, -3.6600),
            (40.3920, -3.6950),
            (40.4020, -3.7230),
        ],
    },
    // Chicago
    City {
        altitude_m: 181.0,
        points: &[
            (41.8827, -87.6233),
            (41.8990, -87.6240),
            (41.9120, -87.6290),
            (41.9320, -87.6400),
            (41.9400, -87.6700),
            (41.9250, -87.7000),
            (41.8950, -87.6950),
            (41.8700, -87.6900),
            (41.8520, -87.6600),
            (41.8580, -87.6260),
        ],
    },
    // São Paulo
    City {
        altitude_m: 760.0,
        points: &[
            (-23.5505, -46.6333),
            (-23.5560, -46.6620),
            (-23.5680, -46.6920),
            (-23.5900, -46.6890),
            (-23.6000, -46.6600),
            (-23.5950, -46.6250),
            (-23.5750, -46.6080),
            (-23.5450, -46.6120),
        ],
    },
    // Nairobi
    City {
        altitude_m: 1_680.0,
        points: &[
            (-1.2864, 36.8172),
            (-1.2720, 36.8110),
            (-1.2600, 36.8030),
            (-1.2630, 36.7830),
            (-1.2850, 36.7780),
            (-1.3000, 36.7890),
            (-1.3120, 36.8150),
            (-1.3050, 36.8400),
            (-1.2900, 36.8350),
        ],
    },
    // Singapore
    City {
        altitude_m: 15.0,
        points: &[
            (1.2830, 103.8510),
            (1.3000, 103.8560),
            (1.3200, 103.8650),
            (1.3350, 103.8480),
            (1.3300, 103.8150),
            (1.3100, 103.8010),
            (1.2900, 103.8060),
            (1.2740, 103.8260),
        ],
    },
    // Sydney
    City {
        altitude_m: 25.0,
        points: &[
            (-33.8688, 151.2093),
            (-33.8830, 151.2170),
            (-33.9050, 151.2230),
            (-33.9200, 151.2020),
            (-33.9130, 151.1700),
            (-33.8950, 151.1500),
            (-33.8770, 151.1650),
            (-33.8720, 151.1900),
        ],
    },
];

const METRES_PER_DEGREE: f64 = 111_320.0;
/// Pieces of one stretch between two points; short enough that turns look round.
const PIECES: u32 = 12;

/// A closed line of points with their distance from the start.
#[derive(Debug)]
struct Loop {
    /// Latitude, longitude, metres from the start.
    points: Vec<(f64, f64, f64)>,
    length_m: f64,
}

impl Loop {
    /// A smooth line through the city's points (Catmull-Rom), so that no vehicle turns on the spot.
    fn through(points: &[(f64, f64)]) -> Self {
        let at = |index: usize| points.get(index % points.len()).copied().unwrap_or_default();
        let mut line = Vec::new();
        let mut length_m = 0.0;
        let mut last: Option<(f64, f64)> = None;
        for index in 0..=points.len() {
            let (a, b, c, d) =
                (at(index + points.len() - 1), at(index), at(index + 1), at(index + 2));
            for piece in 0..PIECES {
                let t = f64::from(piece) / f64::from(PIECES);
                let spline = |a: f64, b: f64, c: f64, d: f64| {
                    0.5 * (2.0 * b
                        + (c - a) * t
                        + (2.0 * a - 5.0 * b + 4.0 * c - d) * t * t
                        + (3.0 * b - a - 3.0 * c + d) * t * t * t)
                };
                let point = (spline(a.0, b.0, c.0, d.0), spline(a.1, b.1, c.1, d.1));
                if let Some(last) = last {
                    length_m += distance_m(last, point);
                }
                last = Some(point);
                line.push((point.0, point.1, length_m));
                if index == points.len() {
                    break;
                }
            }
        }
        Self { points: line, length_m }
    }

    /// The point at `metres` from the start, and the heading there in degrees.
    fn at(&self, metres: f64) -> ((f64, f64), f64) {
        let metres = metres.rem_euclid(self.length_m);
        let after = self.points.partition_point(|point| point.2 <= metres);
        let from = self.points.get(after.saturating_sub(1)).copied().unwrap_or_default();
        let to = self.points.get(after).copied().unwrap_or(from);
        let part = if to.2 > from.2 { (metres - from.2) / (to.2 - from.2) } else { 0.0 };
        let point = (from.0 + (to.0 - from.0) * part, from.1 + (to.1 - from.1) * part);
        let east = (to.1 - from.1) * from.0.to_radians().cos();
        (point, east.atan2(to.0 - from.0).to_degrees().rem_euclid(360.0))
    }
}

fn distance_m(a: (f64, f64), b: (f64, f64)) -> f64 {
    let east = (b.1 - a.1) * a.0.to_radians().cos();
    (b.0 - a.0).hypot(east) * METRES_PER_DEGREE
}

static LOOPS: std::sync::LazyLock<Vec<Loop>> =
    std::sync::LazyLock::new(|| CITIES.iter().map(|city| Loop::through(city.points)).collect());

/// What a tracker measures at one instant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// Metres above the sea.
    pub altitude_m: f64,
    /// Kilometres an hour.
    pub speed_kmh: f64,
    /// Degrees clockwise from north.
    pub direction: f64,
    /// Satellites in use.
    pub satellites: u8,
    /// Horizontal dilution of precision.
    pub hdop: f64,
    /// Whether the ignition is on.
    pub ignition: bool,
    /// Millivolts of the vehicle.
    pub external_mv: u16,
    /// Millivolts of the tracker's own battery.
    pub battery_mv: u16,
    /// Metres driven.
    pub odometer_m: u32,
    /// 0 to 5.
    pub gsm_signal: u8,
}

/// Four of five vehicles drive in the first two cities, so that a map of one shows traffic; the
/// others are all over the world.
fn city_of(number: u32) -> usize {
    let number = usize::try_from(number).unwrap_or(0);
    match number % 5 {
        4 => 2 + number / 5 % CITIES.len().saturating_sub(2).max(1),
        place => place % 2,
    }
}

/// A vehicle on its way.
#[derive(Clone, Debug)]
pub struct Vehicle {
    random: Random,
    city: usize,
    /// Metres along the loop; driven backwards by every second vehicle.
    place_m: f64,
    backwards: bool,
    /// Degrees that keep vehicles of one loop apart, as lanes and side streets do.
    aside: (f64, f64),
    speed_ms: f64,
    cruise_ms: f64,
    odometer_m: f64,
    /// Seconds of driving left before the next stop, or of standing if negative.
    leg_s: f64,
    parked: bool,
}

impl Vehicle {
    /// The vehicle of this number; the same seed and number drive the same way.
    #[must_use]
    pub fn new(seed: u64, number: u32) -> Self {
        let mut random = Random::new(seed ^ (u64::from(number) << 32 | 0x5eed));
        random.next_u64();
        let city = city_of(number);
        let length_m = LOOPS.get(city).map_or(1.0, |route| route.length_m);
        Self {
            city,
            place_m: random.between(0.0, length_m),
            backwards: random.fraction() < 0.5,
            aside: (random.between(-0.0012, 0.0012), random.between(-0.0012, 0.0012)),
            speed_ms: 0.0,
            cruise_ms: random.between(8.0, 19.0),
            odometer_m: random.between(5e6, 2.5e8),
            leg_s: random.between(60.0, 900.0),
            parked: random.fraction() < 0.1,
            random,
        }
    }

    /// Drives on for `seconds` (at most an hour counts) and measures.
    pub fn drive(&mut self, seconds: f64) -> Sample {
        let mut left_s = seconds.clamp(0.0, 3_600.0);
        while left_s > 0.0 {
            let step_s = left_s.min(1.0);
            self.step(step_s);
            left_s -= step_s;
        }
        self.measure()
    }

    fn step(&mut self, seconds: f64) {
        self.leg_s -= seconds;
        if self.leg_s <= 0.0 && (self.parked || self.speed_ms < 0.5) {
            self.parked = !self.parked && self.random.fraction() < 0.3;
            let (low, high) = if self.parked { (120.0, 900.0) } else { (60.0, 900.0) };
            self.leg_s = self.random.between(low, high);
        }
        let route = LOOPS.get(self.city);
        // Slower the more the road turns within the next hundred metres.
        let ahead_m = if self.backwards { -100.0 } else { 100.0 };
        let turn = route.map_or(0.0, |route| {
            let (here, there) = (route.at(self.place_m).1, route.at(self.place_m + ahead_m).1);
            let turn = (there - here).rem_euclid(360.0);
            turn.min(360.0 - turn)
        });
        let target_ms = if self.parked || self.leg_s <= 0.0 {
            0.0
        } else {
            self.cruise_ms / (1.0 + turn / 30.0) * self.random.between(0.9, 1.1)
        };
        let change_ms = (target_ms - self.speed_ms).clamp(-2.5 * seconds, 1.5 * seconds);
        self.speed_ms = (self.speed_ms + change_ms).max(0.0);
        let driven_m = self.speed_ms * seconds;
        self.place_m += if self.backwards { -driven_m } else { driven_m };
        self.odometer_m += driven_m;
    }

    fn measure(&mut self) -> Sample {
        let altitude_m = CITIES.get(self.city).map_or(0.0, |city| city.altitude_m);
        let Some(route) = LOOPS.get(self.city) else { return self.standing(altitude_m) };
        let ((latitude, longitude), heading) = route.at(self.place_m);
        let direction = if self.backwards { (heading + 180.0) % 360.0 } else { heading };
        let hills_m = (self.place_m / 900.0).sin() * 6.0;
        Sample {
            latitude: latitude + self.aside.0,
            longitude: longitude + self.aside.1,
            direction,
            ..self.standing(altitude_m + hills_m)
        }
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "each number is made within the range of its type"
    )]
    fn standing(&mut self, altitude_m: f64) -> Sample {
        let running_mv = if self.parked { 12_500.0 } else { 14_100.0 };
        Sample {
            latitude: 0.0,
            longitude: 0.0,
            altitude_m,
            speed_kmh: self.speed_ms * 3.6,
            direction: 0.0,
            satellites: self.random.between(8.0, 18.0) as u8,
            hdop: self.random.between(0.6, 1.4),
            ignition: !self.parked,
            external_mv: (running_mv + self.random.between(-150.0, 150.0)) as u16,
            battery_mv: (4_050.0 + self.random.between(-60.0, 60.0)) as u16,
            odometer_m: self.odometer_m.min(4e9) as u32,
            gsm_signal: self.random.between(2.0, 5.99) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_drives_the_same_way() {
        let drive = |seed| {
            let mut vehicle = Vehicle::new(seed, 7);
            (0..50).map(|_| vehicle.drive(10.0)).collect::<Vec<_>>()
        };
        assert_eq!(drive(1), drive(1));
        assert_ne!(drive(1), drive(2));
    }

    #[test]
    fn most_vehicles_drive_in_two_cities_and_every_city_has_some() {
        let mut counts = vec![0; CITIES.len()];
        (0..100).for_each(|number| counts[city_of(number)] += 1);
        assert_eq!(counts[..2], [40, 40]);
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    }

    #[test]
    fn vehicles_move_as_vehicles_do() {
        for number in 0..40 {
            let mut vehicle = Vehicle::new(42, number);
            let mut before = vehicle.drive(1.0);
            let mut driven_m = 0.0;
            for _ in 0..2_000 {
                let now = vehicle.drive(1.0);
                let moved_m =
                    distance_m((before.latitude, before.longitude), (now.latitude, now.longitude));
                assert!(moved_m < 30.0, "vehicle {number} jumped {moved_m} m");
                assert!(now.speed_kmh < 90.0 && (now.speed_kmh - before.speed_kmh).abs() < 10.0);
                assert!((0.0..360.0).contains(&now.direction));
                assert!(now.odometer_m >= before.odometer_m);
                assert!(now.ignition || now.speed_kmh < 10.0, "{now:?}");
                driven_m += moved_m;
                before = now;
            }
            assert!(driven_m > 100.0, "vehicle {number} drove {driven_m} m");
        }
    }
}
