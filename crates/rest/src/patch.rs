//! JSON merge patch (RFC 7396), onto the members that may be changed.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value as Json};

use crate::call::named;
use crate::problem::Problem;

/// `edit` with `patch` merged in.
///
/// Members of `view` that are not in `edit` cannot be changed: naming one with
/// the value that it has is passed over, so that a whole object may be sent back.
pub(crate) fn merged<E: Serialize + DeserializeOwned>(
    edit: &E,
    view: &impl Serialize,
    patch: Json,
) -> Result<E, Problem> {
    let Json::Object(patch) = patch else {
        return Err(Problem::invalid(
            "the body of a PATCH is an object with the members to change",
        ));
    };
    let mut target = serde_json::to_value(edit).map_err(Problem::fault)?;
    let view = serde_json::to_value(view).map_err(Problem::fault)?;
    let (mut wanted, mut unknown) = (Map::new(), Vec::new());
    for (name, value) in patch {
        let own = target.get(&name).is_some();
        match view.get(&name) {
            Some(present) if !own && *present == value => {}
            Some(_) if !own => {
                return Err(Problem::member(&name, "cannot be changed by a PATCH"));
            }
            // To take away what was never there is a slip as well as to set it.
            None if !own && value.is_null() => unknown.push(name),
            _ => {
                wanted.insert(name, value);
            }
        }
    }
    merge(&mut target, Json::Object(wanted));
    if let Some(members) = target.as_object_mut() {
        members.extend(unknown.into_iter().map(|name| (name, Json::Null)));
    }
    // Members that were taken away go back to their defaults.
    serde_path_to_error::deserialize(target).map_err(|error| {
        let member = error.path().to_string();
        named(&member, &error.into_inner())
    })
}

fn merge(target: &mut Json, patch: Json) {
    let Json::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Json::Object(Map::new());
    }
    let Some(members) = target.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(&name);
        } else {
            merge(members.entry(name).or_insert(Json::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[test]
    fn the_examples_of_the_specification_hold() {
        // RFC 7396, appendix A.
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut merged = target;
            merge(&mut merged, patch);
            assert_eq!(merged, result);
        }
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Edit {
        name: String,
        #[serde(default)]
        note: String,
    }

    #[test]
    fn only_what_may_be_changed_is_changed() {
        let edit = Edit { name: "a".to_owned(), note: "n".to_owned() };
        let view = json!({"id": 7, "name": "a", "note": "n"});
        let patched = |patch| merged(&edit, &view, patch);
        assert_eq!(patched(json!({"note": null})).unwrap().note, "");
        assert_eq!(patched(json!({"id": 7, "name": "b"})).unwrap().name, "b");
        let fixed = patched(json!({"id": 8})).unwrap_err();
        assert!(fixed.detail().contains("`id`"), "{fixed:?}");
        let unknown = patched(json!({"nam": "b"})).unwrap_err();
        assert!(
            unknown.detail().contains("`nam`") && unknown.detail().contains("`name`"),
            "{unknown:?}"
        );
        let unknown = patched(json!({"nope": null})).unwrap_err();
        assert_eq!(unknown.detail(), patched(json!({"nope": 1})).unwrap_err().detail());
        let wrong = patched(json!({"name": 5})).unwrap_err();
        assert!(wrong.detail().contains("`name`"), "{wrong:?}");
        assert!(patched(json!([])).is_err());
    }
}
