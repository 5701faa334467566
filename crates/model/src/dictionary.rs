//! The built-in dictionary: parameters that mean the same whatever device sends them.

use std::sync::{Arc, LazyLock};

use crate::{ParamKind, ParamName, ParamSpec};

/// One row: name, kind, bits or decimals, unit (UCUM), title, description.
type Row = (&'static str, ParamKind, u8, &'static str, &'static str, &'static str);

use ParamKind::{Bool, Bytes, Decimal, Int, Json, Text};

#[rustfmt::skip]
const ROWS: &[Row] = &[
    ("position.latitude", Decimal, 7, "deg", "Latitude", "Degrees north of the equator, WGS 84"),
    ("position.longitude", Decimal, 7, "deg", "Longitude", "Degrees east of Greenwich, WGS 84"),
    ("position.altitude", Decimal, 3, "m", "Altitude", "Height above mean sea level"),
    ("position.speed", Decimal, 3, "km/h", "Speed", "Speed over ground by satellite navigation"),
    ("position.direction", Decimal, 3, "deg", "Direction", "Course over ground, clockwise from north"),
    ("position.satellites", Int, 8, "", "Satellites", "Satellites used for the fix"),
    ("position.valid", Bool, 1, "", "Position valid", "Whether the position is a present fix"),
    ("position.hdop", Decimal, 2, "", "HDOP", "Horizontal dilution of precision"),
    ("position.vdop", Decimal, 2, "", "VDOP", "Vertical dilution of precision"),
    ("position.pdop", Decimal, 2, "", "PDOP", "Position dilution of precision"),
    ("position.accuracy", Decimal, 1, "m", "Accuracy", "Estimated error of the position"),
    ("position.mode", Int, 8, "", "Fix mode", "Kind of fix: 1 none, 2 in the plane, 3 in space"),
    ("position.age", Int, 32, "s", "Position age", "Time since the position was fixed"),
    ("event.id", Int, 32, "", "Event", "What made the device send the message; 0 is a periodic report"),
    ("event.text", Text, 0, "", "Event text", "What made the device send the message, in its words"),
    ("priority", Int, 8, "", "Priority", "0 low, 1 high, 2 panic"),
    ("generation.type", Int, 8, "", "Generation", "How the event's property changed, by the device's protocol"),
    ("message.text", Text, 0, "", "Text", "Text that a driver or device wrote"),
    ("message.type", Text, 0, "", "Message type", "Kind of packet the message came in"),
    ("timestamp.device", Text, 0, "", "Device time", "The device's own time, where it cannot be right"),
    ("engine.ignition", Bool, 1, "", "Ignition", "Whether the ignition is on"),
    ("engine.rpm", Decimal, 3, "/min", "Engine speed", "Revolutions of the crankshaft"),
    ("engine.load", Decimal, 1, "%", "Engine load", "Share of the full load"),
    ("engine.temperature", Decimal, 1, "Cel", "Engine temperature", "Coolant temperature"),
    ("engine.hours", Decimal, 2, "h", "Engine hours", "Time that the engine has run"),
    ("engine.oil.pressure", Decimal, 1, "kPa", "Oil pressure", "Pressure of the engine oil"),
    ("engine.oil.temperature", Decimal, 1, "Cel", "Oil temperature", "Temperature of the engine oil"),
    ("engine.throttle", Decimal, 1, "%", "Throttle", "Position of the throttle"),
    ("engine.runtime", Int, 32, "s", "Engine run time", "Time since the engine was started"),
    ("movement", Bool, 1, "", "Movement", "Whether the device moves"),
    ("odometer", Decimal, 3, "km", "Odometer", "Distance since the count began"),
    ("trip.odometer", Decimal, 3, "km", "Trip odometer", "Distance since the trip began"),
    ("trip.status", Int, 8, "", "Trip", "Whether a trip begins, goes on or ends"),
    ("idling", Bool, 1, "", "Idling", "Engine on while standing"),
    ("towing", Bool, 1, "", "Towing", "Moved with the ignition off"),
    ("crash", Int, 8, "", "Crash", "Kind of crash detected; 0 none"),
    ("overspeed", Bool, 1, "", "Overspeed", "Faster than allowed"),
    ("overspeed.value", Decimal, 1, "km/h", "Overspeed value", "Speed that was too fast"),
    ("jamming", Bool, 1, "", "Jamming", "The radio is being jammed"),
    ("unplugged", Bool, 1, "", "Unplugged", "External power was taken away"),
    ("green.driving.type", Int, 8, "", "Harsh driving type", "1 acceleration, 2 braking, 3 cornering"),
    ("green.driving.value", Decimal, 2, "", "Harsh driving value", "Strength by the device's measure"),
    ("sleep.mode", Int, 8, "", "Sleep mode", "0 awake; deeper the higher"),
    ("data.mode", Int, 8, "", "Data mode", "Which set of sending rules is in force"),
    ("alarm.sos", Bool, 1, "", "SOS", "The alarm button was pressed"),
    ("alarm.type", Int, 16, "", "Alarm", "Kind of alarm, by the device's protocol"),
    ("battery.voltage", Decimal, 3, "V", "Battery voltage", "Of the device's own battery"),
    ("battery.current", Decimal, 3, "A", "Battery current", "Into the device's own battery"),
    ("battery.level", Decimal, 1, "%", "Battery level", "Charge of the device's own battery"),
    ("battery.charging", Bool, 1, "", "Charging", "Whether the device's own battery is charged"),
    ("battery.temperature", Decimal, 1, "Cel", "Battery temperature", "Of the device's own battery"),
    ("external.voltage", Decimal, 3, "V", "External voltage", "Of the vehicle or supply"),
    ("gsm.signal", Int, 8, "", "GSM signal", "Strength by the device's measure, often 0 to 5"),
    ("gsm.operator", Int, 32, "", "GSM operator", "Country and network code as one number"),
    ("gsm.mcc", Int, 16, "", "MCC", "Mobile country code"),
    ("gsm.mnc", Int, 16, "", "MNC", "Mobile network code"),
    ("gsm.lac", Int, 16, "", "LAC", "Location area code"),
    ("gsm.cellid", Int, 32, "", "Cell", "Cell identity"),
    ("gsm.network.type", Int, 8, "", "Network type", "Radio technology in use"),
    ("gsm.iccid.high", Int, 64, "", "ICCID, first half", "First half of the SIM card's number"),
    ("gsm.iccid.low", Int, 64, "", "ICCID, second half", "Second half of the SIM card's number"),
    ("gsm.iccid", Text, 0, "", "ICCID", "The SIM card's number"),
    ("gsm.imsi", Text, 0, "", "IMSI", "The subscriber's number"),
    ("gnss.status", Int, 8, "", "GNSS status", "State of the satellite receiver"),
    ("digital.inputs", Int, 32, "", "Digital inputs", "All inputs as bits, the first lowest"),
    ("digital.outputs", Int, 32, "", "Digital outputs", "All outputs as bits, the first lowest"),
    ("digital.input.1", Bool, 1, "", "Digital input 1", "State of the input"),
    ("digital.input.2", Bool, 1, "", "Digital input 2", "State of the input"),
    ("digital.input.3", Bool, 1, "", "Digital input 3", "State of the input"),
    ("digital.input.4", Bool, 1, "", "Digital input 4", "State of the input"),
    ("digital.output.1", Bool, 1, "", "Digital output 1", "State of the output"),
    ("digital.output.2", Bool, 1, "", "Digital output 2", "State of the output"),
    ("digital.output.3", Bool, 1, "", "Digital output 3", "State of the output"),
    ("digital.output.4", Bool, 1, "", "Digital output 4", "State of the output"),
    ("analog.input.1", Decimal, 3, "V", "Analog input 1", "Voltage at the input"),
    ("analog.input.2", Decimal, 3, "V", "Analog input 2", "Voltage at the input"),
    ("analog.input.3", Decimal, 3, "V", "Analog input 3", "Voltage at the input"),
    ("analog.input.4", Decimal, 3, "V", "Analog input 4", "Voltage at the input"),
    ("adc", Json, 0, "", "Analog inputs", "All analog inputs in order; null where absent"),
    ("acceleration.x", Decimal, 3, "[g]", "Acceleration X", "Along the device's x axis"),
    ("acceleration.y", Decimal, 3, "[g]", "Acceleration Y", "Along the device's y axis"),
    ("acceleration.z", Decimal, 3, "[g]", "Acceleration Z", "Along the device's z axis"),
    ("temperature.1", Decimal, 2, "Cel", "Temperature 1", "First wired sensor"),
    ("temperature.2", Decimal, 2, "Cel", "Temperature 2", "Second wired sensor"),
    ("temperature.3", Decimal, 2, "Cel", "Temperature 3", "Third wired sensor"),
    ("temperature.4", Decimal, 2, "Cel", "Temperature 4", "Fourth wired sensor"),
    ("temperature.sensor.1.id", Int, 64, "", "Sensor 1", "Number of the first wired sensor"),
    ("temperature.sensor.2.id", Int, 64, "", "Sensor 2", "Number of the second wired sensor"),
    ("temperature.sensor.3.id", Int, 64, "", "Sensor 3", "Number of the third wired sensor"),
    ("temperature.sensor.4.id", Int, 64, "", "Sensor 4", "Number of the fourth wired sensor"),
    ("temperature.device", Decimal, 1, "Cel", "Device temperature", "Inside the device"),
    ("ble.temperature.1", Decimal, 2, "Cel", "Bluetooth temperature 1", "First Bluetooth sensor"),
    ("ble.temperature.2", Decimal, 2, "Cel", "Bluetooth temperature 2", "Second Bluetooth sensor"),
    ("ble.temperature.3", Decimal, 2, "Cel", "Bluetooth temperature 3", "Third Bluetooth sensor"),
    ("ble.temperature.4", Decimal, 2, "Cel", "Bluetooth temperature 4", "Fourth Bluetooth sensor"),
    ("ble.humidity.1", Decimal, 1, "%", "Bluetooth humidity 1", "First Bluetooth sensor"),
    ("ble.humidity.2", Decimal, 1, "%", "Bluetooth humidity 2", "Second Bluetooth sensor"),
    ("ble.humidity.3", Decimal, 1, "%", "Bluetooth humidity 3", "Third Bluetooth sensor"),
    ("ble.humidity.4", Decimal, 1, "%", "Bluetooth humidity 4", "Fourth Bluetooth sensor"),
    ("ble.battery.1", Decimal, 1, "%", "Bluetooth battery 1", "Charge of the first Bluetooth sensor"),
    ("ble.battery.2", Decimal, 1, "%", "Bluetooth battery 2", "Charge of the second Bluetooth sensor"),
    ("ble.battery.3", Decimal, 1, "%", "Bluetooth battery 3", "Charge of the third Bluetooth sensor"),
    ("ble.battery.4", Decimal, 1, "%", "Bluetooth battery 4", "Charge of the fourth Bluetooth sensor"),
    ("ble.beacons", Bytes, 0, "", "Beacons", "Bluetooth beacons heard, as the device lists them"),
    ("humidity", Decimal, 1, "%", "Humidity", "Relative humidity"),
    ("pressure", Decimal, 2, "hPa", "Air pressure", "Barometric pressure"),
    ("ibutton", Int, 64, "", "iButton", "Number of the key held to the reader"),
    ("rfid", Text, 0, "", "RFID", "Number of the card held to the reader"),
    ("driver.id", Text, 0, "", "Driver", "Who drives, by key or card"),
    ("driver.name", Text, 0, "", "Driver name", "Who drives"),
    ("vehicle.vin", Text, 0, "", "VIN", "Vehicle identification number"),
    ("vehicle.mileage", Decimal, 3, "km", "Vehicle mileage", "By the vehicle's own odometer"),
    ("vehicle.speed", Decimal, 1, "km/h", "Vehicle speed", "By the vehicle's own speedometer"),
    ("vehicle.doors", Int, 16, "", "Doors", "Open doors as bits"),
    ("vehicle.trouble.codes", Text, 0, "", "Trouble codes", "Diagnostic trouble codes"),
    ("vehicle.trouble.count", Int, 8, "", "Trouble count", "Count of diagnostic trouble codes"),
    ("obd.load", Decimal, 1, "%", "OBD engine load", "Calculated by the engine's controller"),
    ("obd.coolant.temperature", Decimal, 1, "Cel", "OBD coolant", "Coolant temperature"),
    ("obd.rpm", Decimal, 2, "/min", "OBD engine speed", "Revolutions of the crankshaft"),
    ("obd.speed", Decimal, 1, "km/h", "OBD speed", "By the vehicle's own controller"),
    ("obd.throttle", Decimal, 1, "%", "OBD throttle", "Position of the throttle"),
    ("obd.fuel.level", Decimal, 1, "%", "OBD fuel level", "Share of a full tank"),
    ("obd.fuel.rate", Decimal, 2, "L/h", "OBD fuel rate", "Fuel used by the hour"),
    ("obd.intake.temperature", Decimal, 1, "Cel", "OBD intake air", "Temperature of the intake air"),
    ("obd.intake.pressure", Decimal, 1, "kPa", "OBD intake pressure", "Pressure in the intake manifold"),
    ("obd.mileage", Decimal, 3, "km", "OBD mileage", "By the vehicle's own controller"),
    ("can.speed", Decimal, 1, "km/h", "CAN speed", "By the vehicle's bus"),
    ("can.rpm", Decimal, 3, "/min", "CAN engine speed", "By the vehicle's bus"),
    ("can.fuel.used", Decimal, 3, "L", "CAN fuel used", "Total by the vehicle's bus"),
    ("can.fuel.volume", Decimal, 1, "L", "CAN fuel volume", "In the tank by the vehicle's bus"),
    ("can.fuel.level", Decimal, 1, "%", "CAN fuel level", "Share of a full tank by the vehicle's bus"),
    ("can.mileage", Decimal, 3, "km", "CAN mileage", "By the vehicle's bus"),
    ("can.engine.temperature", Decimal, 1, "Cel", "CAN engine temperature", "By the vehicle's bus"),
    ("can.engine.load", Decimal, 1, "%", "CAN engine load", "By the vehicle's bus"),
    ("can.engine.hours", Decimal, 2, "h", "CAN engine hours", "By the vehicle's bus"),
    ("can.pedal", Decimal, 1, "%", "CAN pedal", "Position of the accelerator"),
    ("can.axle.1.load", Int, 32, "kg", "CAN axle 1 load", "Load on the first axle"),
    ("can.axle.2.load", Int, 32, "kg", "CAN axle 2 load", "Load on the second axle"),
    ("can.axle.3.load", Int, 32, "kg", "CAN axle 3 load", "Load on the third axle"),
    ("can.doors", Int, 16, "", "CAN doors", "Open doors as bits"),
    ("fuel.level", Decimal, 1, "%", "Fuel level", "Share of a full tank"),
    ("fuel.volume", Decimal, 2, "L", "Fuel volume", "In the tank"),
    ("fuel.used", Decimal, 3, "L", "Fuel used", "Total"),
    ("fuel.rate", Decimal, 2, "L/h", "Fuel rate", "Used by the hour"),
    ("fuel.temperature", Decimal, 1, "Cel", "Fuel temperature", "In the tank"),
    ("energy.active.import", Decimal, 3, "kW.h", "Energy taken", "Active energy from the network"),
    ("energy.active.export", Decimal, 3, "kW.h", "Energy given", "Active energy to the network"),
    ("power.active", Decimal, 3, "W", "Active power", "At present"),
    ("voltage", Decimal, 3, "V", "Voltage", "At the terminals"),
    ("current", Decimal, 3, "A", "Current", "Through the meter"),
    ("frequency", Decimal, 3, "Hz", "Frequency", "Of the network"),
    ("volume", Decimal, 3, "m3", "Volume", "That has passed the meter"),
    ("flow", Decimal, 3, "m3/h", "Flow", "Through the meter"),
    ("temperature", Decimal, 2, "Cel", "Temperature", "Where the device is"),
];

static DICTIONARY: LazyLock<Vec<Arc<ParamSpec>>> = LazyLock::new(|| {
    let specs = ROWS.iter().filter_map(|&(name, kind, size, unit, title, description)| {
        Some(Arc::new(ParamSpec {
            name: ParamName::new(name).ok()?,
            kind,
            bits: if kind == Decimal { 0 } else { size },
            decimals: if kind == Decimal { size } else { 0 },
            unit: unit.to_owned(),
            title: title.to_owned(),
            description: description.to_owned(),
        }))
    });
    specs.collect()
});

/// Every built-in parameter.
#[must_use]
pub fn dictionary() -> &'static [Arc<ParamSpec>] {
    &DICTIONARY
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_dotted_and_lower_case() {
        let names: HashSet<&str> = ROWS.iter().map(|row| row.0).collect();
        assert_eq!(names.len(), ROWS.len());
        assert_eq!(dictionary().len(), ROWS.len());
        assert!(ROWS.len() >= 120);
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.';
        assert!(names.iter().all(|name| name.chars().all(fits)));
    }
}
