//! Changes of JSON: of a value somewhere in it, or of its text.

use serde_json::{Map, Value, json};

use crate::numbers::Numbers;

/// Changes a value of a document.
pub(crate) fn change(document: &mut Value, numbers: &mut Numbers) -> Option<String> {
    let mut places = Vec::new();
    collect(document, &mut String::new(), &mut places);
    let place = numbers.pick(&places).clone();
    let other: &String = numbers.pick(&places);
    let other = document.pointer(other)?.clone();
    let value = document.pointer_mut(&place)?;
    let before = value.clone();
    let what = match (numbers.below(8), &mut *value) {
        (0, _) => {
            *value = other;
            "another value of the document"
        }
        (1, _) => {
            *value =
                numbers.pick(&[json!(null), json!([]), json!({}), json!(""), json!("x"), json!(7), json!(-1)]).clone();
            "another value"
        }
        (2, Value::Array(list)) if !list.is_empty() => {
            let at = numbers.below(list.len());
            list.insert(at, list.get(at)?.clone());
            "an element is there twice"
        }
        (3, Value::Array(list)) if !list.is_empty() => {
            let ends = (numbers.below(list.len()), numbers.below(list.len()));
            list.swap(ends.0, ends.1);
            "elements are exchanged"
        }
        (4, Value::Array(list)) if !list.is_empty() => {
            let at = numbers.below(list.len());
            list.get(at)?;
            list.remove(at);
            "an element is left out"
        }
        (2 | 3, Value::Object(fields)) if !fields.is_empty() => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            fields.remove(numbers.pick(&keys));
            "a field is left out"
        }
        (4, Value::Object(fields)) => rename(fields, numbers)?,
        (_, Value::Object(fields)) => add(fields, numbers, other),
        (_, Value::Number(number)) => {
            let number = number.as_u64()?;
            *value = numbers.pick(&[number + 1, number.saturating_sub(1), number * 2, 0, u64::MAX]).to_owned().into();
            "another number"
        }
        (_, Value::String(text)) => {
            change_string(text, numbers)?;
            "another text"
        }
        (_, _) => return None,
    };
    let now = document.pointer(&place)?;
    let describe = |value: &Value| value.to_string().chars().take(120).collect::<String>();
    Some(format!("{place}: {what}: {} to {}", describe(&before), describe(now)))
}

fn collect(value: &Value, place: &mut String, places: &mut Vec<String>) {
    places.push(place.clone());
    let len = place.len();
    let mut enter = |key: &str, value: &Value| {
        place.push('/');
        place.push_str(&key.replace('~', "~0").replace('/', "~1"));
        collect(value, place, places);
        place.truncate(len);
    };
    match value {
        Value::Array(list) => list.iter().enumerate().for_each(|(number, value)| enter(&number.to_string(), value)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| enter(key, value)),
        _ => {}
    }
}

fn rename(fields: &mut Map<String, Value>, numbers: &mut Numbers) -> Option<&'static str> {
    let keys: Vec<String> = fields.keys().cloned().collect();
    if keys.is_empty() {
        return None;
    }
    let key = numbers.pick(&keys);
    let mut other = key.clone();
    change_string(&mut other, numbers)?;
    let value = fields.remove(key)?;
    fields.insert(other, value);
    Some("a field has another name")
}

/// Fields that a program may look for.
fn add(fields: &mut Map<String, Value>, numbers: &mut Numbers, other: Value) -> &'static str {
    let key = *numbers.pick(&[
        "urls",
        "data",
        "subject",
        "artifactType",
        "annotations",
        "platform",
        "mediaType",
        "layers",
        "Layers",
        "config",
        "manifests",
        "size",
        "os.features",
        "variant",
        "containerd.io/snapshot/lazuli/hot.len",
        "containerd.io/snapshot/lazuli/image",
        "containerd.io/snapshot/lazuli/version",
        "io.lazuli.source.digest",
        "io.lazuli.source.options",
        "vnd.docker.reference.digest",
        "anything",
    ]);
    let value = match numbers.below(5) {
        0 => json!("x"),
        1 => json!(["https://example.com/x"]),
        2 => json!({"x": "y"}),
        3 => json!("eyJ9"),
        _ => other,
    };
    fields.insert(key.to_owned(), value);
    "a field more"
}

fn change_string(text: &mut String, numbers: &mut Numbers) -> Option<()> {
    let mut letters: Vec<char> = text.chars().collect();
    let at = numbers.below(letters.len());
    match numbers.below(5) {
        0 => letters.push('x'),
        1 => letters.insert(at, ' '),
        2 if letters.len() > at => drop(letters.remove(at)),
        3 => letters.iter_mut().for_each(|letter| letter.make_ascii_uppercase()),
        _ => {
            let letter = letters.get_mut(at)?;
            *letter = if letter.is_ascii_digit() { char::from(b'0' + numbers.byte() % 10) } else { 'x' };
        }
    }
    *text = letters.into_iter().collect();
    Some(())
}

/// Changes the text of a document.
pub(crate) fn change_text(text: &mut Vec<u8>, numbers: &mut Numbers) -> Option<String> {
    let at = numbers.below(text.len());
    let what = match numbers.below(5) {
        0 => {
            text.insert(at, *numbers.pick(b" \n\t\"\\,:{}[]0a\0"));
            "a byte more"
        }
        1 => {
            text.remove(at);
            "a byte less"
        }
        2 => {
            text.extend(*numbers.pick(&[b" ".as_slice(), b"\n", b"{}", b"x"]));
            "something behind it"
        }
        3 => {
            // A second field of a name that is there, before or behind the first.
            let fields: Vec<usize> = (0..text.len()).filter(|at| text[*at] == b'{').collect();
            let start = *numbers.pick(&fields) + 1;
            let key_len = text[start..].iter().skip(1).position(|byte| *byte == b'"')? + 2;
            let mut key = text[start..start + key_len].to_vec();
            if numbers.below(2) == 0 {
                key.make_ascii_uppercase();
            }
            let field =
                [key.as_slice(), b":", *numbers.pick(&[b"[]".as_slice(), b"1", b"\"x\"", b"{}"]), b","].concat();
            text.splice(start..start, field);
            "a field twice"
        }
        _ => {
            numbers.change_bytes(text)?;
            "bytes"
        }
    };
    Some(format!("{what} at {at}"))
}
