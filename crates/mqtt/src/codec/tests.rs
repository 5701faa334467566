//! Our codec against another one: each reads what the other writes.

use bytes::BytesMut;
use mqtt_protocol_core::mqtt::packet::{
    CorrelationData, MessageExpiryInterval, Property, Qos as OtherQos, RetainHandling, SubEntry,
    SubOpts, SubscriptionIdentifier, TopicAlias, UserProperty, v3_1_1, v5_0,
};
use proptest::prelude::*;

use super::*;
use crate::encode::{Outgoing, publish_bytes};

fn frame(bytes: &[u8]) -> Frame {
    let mut input = BytesMut::from(bytes);
    let frame = take_frame(&mut input, usize::MAX).unwrap().unwrap();
    assert!(input.is_empty());
    frame
}

fn name() -> impl Strategy<Value = String> {
    "[a-zé/]{1,40}"
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..200)
}

proptest! {
    #[test]
    fn connect_of_the_other_is_read(
        client_id in "[a-z0-9]{0,30}", user in name(), password in bytes(), keep_alive: u16,
        clean: bool, will in proptest::option::of((name(), bytes(), 0_u8..2, any::<bool>())), v5: bool,
    ) {
        macro_rules! build {
            ($connect:ty, $clean:ident) => {{
                let mut builder = <$connect>::builder()
                    .client_id(client_id.as_str()).unwrap()
                    .$clean(clean)
                    .keep_alive(keep_alive)
                    .user_name(user.as_str()).unwrap()
                    .password(password.clone()).unwrap();
                if let Some((topic, payload, qos, retain)) = &will {
                    let qos = OtherQos::try_from(*qos).unwrap();
                    builder = builder
                        .will_message(topic.as_str(), payload.clone(), qos, *retain).unwrap();
                }
                builder.build().unwrap().to_continuous_buffer()
            }};
        }
        let written = match v5 {
            true => build!(v5_0::Connect, clean_start),
            false => build!(v3_1_1::Connect, clean_session),
        };
        let read = Connect::decode(&frame(&written)).unwrap();
        prop_assert_eq!(read.version, if v5 { Version::V5 } else { Version::V3 });
        prop_assert_eq!(read.client_id.as_str(), client_id);
        prop_assert_eq!(read.user_name.as_ref().map(Text::as_str), Some(user.as_str()));
        prop_assert_eq!(read.password.as_deref(), Some(&password[..]));
        prop_assert_eq!((read.keep_alive_s, read.clean_start), (keep_alive, clean));
        let found = read.will.map(|w| {
            (w.topic.as_str().to_owned(), w.payload.to_vec(), w.qos as u8, w.retain)
        });
        prop_assert_eq!(found, will);
    }

    #[test]
    fn publish_of_the_other_is_read(
        topic in name(), payload in bytes(), qos in 0_u8..3, retain: bool, id in 1_u16..,
        alias in proptest::option::of(1_u16..), expiry in proptest::option::of(any::<u32>()),
        correlation in proptest::option::of(bytes()),
        user in proptest::collection::vec(("[a-z]{1,9}", "[a-z]{0,9}"), 0..4),
    ) {
        let mut props = vec![];
        let mut forwarded = vec![];
        for (key, value) in &user {
            forwarded.push(Property::UserProperty(UserProperty::new(key.as_str(), value.as_str()).unwrap()));
        }
        if let Some(data) = &correlation {
            forwarded.push(Property::CorrelationData(CorrelationData::new(data.clone()).unwrap()));
        }
        props.extend(forwarded.iter().take(2).cloned());
        props.extend(alias.map(|n| Property::TopicAlias(TopicAlias::new(n).unwrap())));
        props.extend(expiry.map(|n| Property::MessageExpiryInterval(MessageExpiryInterval::new(n).unwrap())));
        props.extend(forwarded.iter().skip(2).cloned());
        let mut builder = v5_0::Publish::builder()
            .topic_name(topic.as_str()).unwrap()
            .payload(payload.clone())
            .qos(OtherQos::try_from(qos).unwrap())
            .retain(retain)
            .props(props);
        if qos > 0 {
            builder = builder.packet_id(id);
        }
        let written = builder.build().unwrap().to_continuous_buffer();
        let Packet::Publish(read) = Packet::decode(frame(&written), Version::V5).unwrap() else {
            panic!("no PUBLISH");
        };
        prop_assert_eq!((read.topic.as_str(), &read.payload[..]), (topic.as_str(), &payload[..]));
        prop_assert_eq!((read.qos as u8, read.retain), (qos, retain));
        prop_assert_eq!(read.packet_id, (qos > 0).then_some(id));
        prop_assert_eq!((read.props.topic_alias, read.props.expiry_s), (alias, expiry));
        prop_assert_eq!(read.props.correlation.as_deref(), correlation.as_deref());
        let wanted: Vec<u8> = forwarded.iter().flat_map(Property::to_continuous_buffer).collect();
        prop_assert_eq!(&read.props.forward[..], &wanted[..]);
    }

    #[test]
    fn subscribe_of_the_other_is_read(
        id in 1_u16..,
        filters in proptest::collection::vec((name(), 0_u8..3, any::<bool>(), any::<bool>(), 0_u8..3), 1..5),
        identifier in proptest::option::of(1_u32..268_435_455),
    ) {
        let entries: Vec<SubEntry> = filters.iter().map(|(filter, qos, nl, rap, rh)| {
            let options = SubOpts::new()
                .set_qos(OtherQos::try_from(*qos).unwrap())
                .set_nl(*nl)
                .set_rap(*rap)
                .set_rh(RetainHandling::try_from(*rh).unwrap());
            SubEntry::new(filter.as_str(), options).unwrap()
        }).collect();
        let props: Vec<Property> = identifier
            .map(|n| Property::SubscriptionIdentifier(SubscriptionIdentifier::new(n).unwrap()))
            .into_iter()
            .collect();
        let written = v5_0::Subscribe::builder()
            .packet_id(id).entries(entries).props(props)
            .build().unwrap().to_continuous_buffer();
        let Packet::Subscribe(read) = Packet::decode(frame(&written), Version::V5).unwrap() else {
            panic!("no SUBSCRIBE");
        };
        prop_assert_eq!((read.packet_id, read.identifier), (id, identifier.unwrap_or(0)));
        let found: Vec<_> = read.filters.iter().map(|s| {
            let filter = s.filter.as_str().to_owned();
            (filter, s.qos as u8, s.no_local, s.retain_as_published, s.retain_handling)
        }).collect();
        prop_assert_eq!(found, filters);
    }

    #[test]
    fn the_other_reads_our_publish(
        topic in name(), payload in bytes(), id in proptest::option::of(1_u16..), retain: bool,
        expiry_s in proptest::option::of(any::<u32>()),
        identifiers in proptest::collection::vec(1_u32..268_435_455, 0..4), v5: bool,
    ) {
        let version = if v5 { Version::V5 } else { Version::V3 };
        let outgoing = Outgoing {
            topic: &topic, payload: &payload, packet_id: id, retain, props: &[], expiry_s,
            identifiers: &identifiers,
        };
        let mut out = BytesMut::new();
        publish(&mut out, version, &outgoing);
        prop_assert_eq!(out.len(), publish_bytes(version, &outgoing));
        let Frame { first, body } = frame(&out);
        prop_assert_eq!(first >> 4, 3);
        let body: std::sync::Arc<[u8]> = body.to_vec().into();
        macro_rules! check {
            ($publish:expr) => {{
                let (read, _) = $publish.unwrap();
                prop_assert_eq!(read.topic_name(), topic.as_str());
                prop_assert_eq!(read.payload().as_slice(), &payload[..]);
                prop_assert_eq!((read.packet_id(), read.retain()), (id, retain));
                prop_assert_eq!(read.qos() as u8, u8::from(id.is_some()));
                read
            }};
        }
        if !v5 {
            check!(v3_1_1::Publish::parse(first & 15, body));
            return Ok(());
        }
        let read = check!(v5_0::Publish::parse(first & 15, body));
        let mut found = vec![];
        let mut expiry = None;
        for property in read.props() {
            match property {
                Property::SubscriptionIdentifier(n) => found.push(n.val()),
                Property::MessageExpiryInterval(n) => expiry = Some(n.val()),
                other => panic!("unexpected {other:?}"),
            }
        }
        prop_assert_eq!((found, expiry), (identifiers, expiry_s));
    }

    #[test]
    fn the_other_reads_our_answers(
        id in 1_u16.., text in proptest::option::of("[a-z ]{0,300}"), granted in 0_u8..2,
    ) {
        let text = text.as_deref();
        let mut out = BytesMut::new();
        puback(&mut out, Version::V5, id, Reason::QuotaExceeded, text);
        let read = v5_0::Puback::parse(&frame(&out).body).unwrap();
        prop_assert_eq!((read.0.packet_id(), read.1), (id, frame(&out).body.len()));

        let mut out = BytesMut::new();
        let qos = if granted == 0 { Qos::AtMostOnce } else { Qos::AtLeastOnce };
        let results = [Ok(qos), Err(Reason::NotAuthorized)];
        suback(&mut out, Version::V5, id, &results, text);
        let body = frame(&out).body;
        let read = v5_0::Suback::parse(&body).unwrap();
        prop_assert_eq!((read.0.packet_id(), read.1), (id, body.len()));
        prop_assert_eq!(&body[body.len() - 2..], &[granted, 0x87]);
        let mut out = BytesMut::new();
        suback(&mut out, Version::V3, id, &results, text);
        let body = frame(&out).body;
        prop_assert_eq!(v3_1_1::Suback::parse(&body).unwrap().1, body.len());
        prop_assert_eq!(&body[2..], &[granted, 0x80]);

        let mut out = BytesMut::new();
        unsuback(&mut out, Version::V5, id, &[Reason::Success, Reason::NoSubscriptionExisted]);
        let body = frame(&out).body;
        prop_assert_eq!(v5_0::Unsuback::parse(&body).unwrap().1, body.len());
        let mut out = BytesMut::new();
        unsuback(&mut out, Version::V3, id, &[Reason::Success]);
        prop_assert_eq!(v3_1_1::Unsuback::parse(&frame(&out).body).unwrap().1, 2);

        let mut out = BytesMut::new();
        disconnect(&mut out, Version::V5, Reason::SessionTakenOver, text);
        let body = frame(&out).body;
        prop_assert_eq!(v5_0::Disconnect::parse(&body).unwrap().1, body.len());

        let mut out = BytesMut::new();
        let props = ConnackProps { reason_string: text, ..ConnackProps::default() };
        connack(&mut out, Version::V5, Reason::BadUserNameOrPassword, &props);
        let body = frame(&out).body;
        prop_assert_eq!(v5_0::Connack::parse(&body).unwrap().1, body.len());
    }
}

#[test]
fn every_reason_has_a_label_of_its_own() {
    let mut labels: Vec<&str> = (0..=u8::MAX).filter_map(reason).map(Reason::code).collect();
    let count = labels.len();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), count);
}

/// The reason of a number, by what we send.
fn reason(number: u8) -> Option<Reason> {
    Reason::ALL.iter().copied().find(|r| r.number() == number)
}
