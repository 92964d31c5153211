//! The rules of the contract, checked over its descriptors: buf's STANDARD and COMMENTS categories, as far as they
//! say something about names, shapes and comments (<https://buf.build/docs/lint/rules/>).

use prost::Message as _;
use prost_types::field_descriptor_proto::Type;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto,
};
use std::collections::{BTreeMap, BTreeSet};

// Field numbers of descriptor.proto: the steps of a path into a file's source information.
const FILE_MESSAGE: i32 = 4;
const FILE_ENUM: i32 = 5;
const FILE_SERVICE: i32 = 6;
const MESSAGE_FIELD: i32 = 2;
const MESSAGE_NESTED: i32 = 3;
const MESSAGE_ENUM: i32 = 4;
const MESSAGE_ONEOF: i32 = 8;
const ENUM_VALUE: i32 = 2;
const SERVICE_METHOD: i32 = 2;

/// What is wrong in the files of our own package.
#[derive(Default)]
struct Report {
    wrong: Vec<String>,
    comments: BTreeSet<Vec<i32>>,
    file: String,
}

impl Report {
    fn rule(&mut self, holds: bool, rule: &str, name: &str) {
        if !holds {
            self.wrong.push(format!("{}: {name}: {rule}", self.file));
        }
    }

    fn commented(&mut self, path: &[i32], name: &str) {
        let commented = self.comments.contains(path);
        self.rule(commented, "has no comment above it", name);
    }

    fn message(&mut self, message: &DescriptorProto, path: &[i32], parent: &str) {
        if message.options.as_ref().is_some_and(|o| o.map_entry()) {
            return;
        }
        let name = format!("{parent}{}", message.name());
        self.rule(pascal_case(message.name()), "a message is PascalCase", &name);
        self.commented(path, &name);
        for (i, field) in message.field.iter().enumerate() {
            let name = format!("{name}.{}", field.name());
            self.rule(lower_snake_case(field.name()), "a field is lower_snake_case", &name);
            self.rule(field.r#type() != Type::Group, "no groups", &name);
            self.commented(&[path, &[MESSAGE_FIELD, i as i32]].concat(), &name);
        }
        for (i, oneof) in message.oneof_decl.iter().enumerate() {
            // `optional` is a oneof of one that protoc makes up; its name begins with an underscore.
            if !oneof.name().starts_with('_') {
                let name = format!("{name}.{}", oneof.name());
                self.rule(lower_snake_case(oneof.name()), "a oneof is lower_snake_case", &name);
                self.commented(&[path, &[MESSAGE_ONEOF, i as i32]].concat(), &name);
            }
        }
        for (i, nested) in message.nested_type.iter().enumerate() {
            self.message(nested, &[path, &[MESSAGE_NESTED, i as i32]].concat(), &format!("{name}."));
        }
        for (i, nested) in message.enum_type.iter().enumerate() {
            self.enumeration(nested, &[path, &[MESSAGE_ENUM, i as i32]].concat(), &format!("{name}."));
        }
    }

    fn enumeration(&mut self, enumeration: &EnumDescriptorProto, path: &[i32], parent: &str) {
        let name = format!("{parent}{}", enumeration.name());
        self.rule(pascal_case(enumeration.name()), "an enum is PascalCase", &name);
        self.commented(path, &name);
        let aliased = enumeration.options.as_ref().is_some_and(|o| o.allow_alias());
        self.rule(!aliased, "no aliases", &name);
        let prefix = format!("{}_", upper_snake_case(enumeration.name()));
        for (i, value) in enumeration.value.iter().enumerate() {
            let of = format!("{name}.{}", value.name());
            self.rule(value.name().starts_with(&prefix), &format!("begins with {prefix}"), &of);
            let zero = format!("{prefix}UNSPECIFIED");
            self.rule((value.number() == 0) == (value.name() == zero), &format!("zero is {zero}"), &of);
            self.commented(&[path, &[ENUM_VALUE, i as i32]].concat(), &of);
        }
    }

    fn service(
        &mut self,
        service: &ServiceDescriptorProto,
        path: &[i32],
        uses: &mut BTreeMap<String, String>,
    ) {
        let name = service.name();
        self.rule(pascal_case(name) && name.ends_with("Service"), "PascalCase ending in Service", name);
        self.commented(path, name);
        for (i, method) in service.method.iter().enumerate() {
            let of = format!("{name}.{}", method.name());
            self.rule(pascal_case(method.name()), "an rpc is PascalCase", &of);
            self.commented(&[path, &[SERVICE_METHOD, i as i32]].concat(), &of);
            for (used, kind) in [(method.input_type(), "Request"), (method.output_type(), "Response")] {
                let wanted = format!("{}{kind}", method.name());
                let short = used.rsplit('.').next().unwrap_or_default();
                let standard = short == wanted || short == format!("{name}{wanted}");
                self.rule(standard, &format!("its {kind} is {wanted}, not {short}"), &of);
                if let Some(other) = uses.insert(used.to_owned(), of.clone()) {
                    self.rule(false, &format!("{short} is also used by {other}"), &of);
                }
            }
        }
    }

    fn check(&mut self, file: &FileDescriptorProto, uses: &mut BTreeMap<String, String>) {
        self.file = file.name().to_owned();
        let info = file.source_code_info.iter().flat_map(|info| &info.location);
        let commented = info.filter(|l| l.leading_comments.as_deref().is_some_and(|c| !c.trim().is_empty()));
        self.comments = commented.map(|location| location.path.clone()).collect();
        let directory = file.name().rsplit_once('/').map_or("", |(directory, _)| directory);
        self.rule(directory.replace('/', ".") == file.package(), "the folder is the package", file.package());
        let version = file.package().rsplit('.').next().unwrap_or_default();
        let versioned = version.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok());
        self.rule(versioned, "the package ends in a version", file.package());
        self.rule(file.syntax() == "proto3", "proto3", file.syntax());
        self.rule(file.public_dependency.is_empty() && file.weak_dependency.is_empty(), "plain imports", "");
        let stem = file.name().rsplit('/').next().and_then(|n| n.strip_suffix(".proto")).unwrap_or_default();
        self.rule(lower_snake_case(stem), "a file is lower_snake_case", stem);
        for (i, message) in file.message_type.iter().enumerate() {
            self.message(message, &[FILE_MESSAGE, i as i32], "");
        }
        for (i, enumeration) in file.enum_type.iter().enumerate() {
            self.enumeration(enumeration, &[FILE_ENUM, i as i32], "");
        }
        for (i, service) in file.service.iter().enumerate() {
            self.service(service, &[FILE_SERVICE, i as i32], uses);
        }
    }
}

fn lower_snake_case(name: &str) -> bool {
    let first = name.starts_with(|c: char| c.is_ascii_lowercase());
    first
        && !name.contains("__")
        && !name.ends_with('_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn pascal_case(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase()) && name.chars().all(|c| c.is_ascii_alphanumeric())
}

/// `RoutePolicy` as `ROUTE_POLICY`.
fn upper_snake_case(name: &str) -> String {
    let mut upper = String::new();
    for (i, c) in name.chars().enumerate() {
        if i > 0 && c.is_ascii_uppercase() {
            upper.push('_');
        }
        upper.push(c.to_ascii_uppercase());
    }
    upper
}

#[test]
fn the_contract_follows_its_rules() {
    let set = FileDescriptorSet::decode(weir_proto::FILE_DESCRIPTOR_SET).expect("a descriptor set");
    let ours: Vec<_> = set.file.iter().filter(|file| file.package().starts_with("weir.")).collect();
    assert!(ours.len() >= 5, "five files at least: {}", ours.len());
    let (mut report, mut uses) = (Report::default(), BTreeMap::new());
    for file in ours {
        report.check(file, &mut uses);
    }
    assert!(report.wrong.is_empty(), "\n{}", report.wrong.join("\n"));
}

#[test]
fn a_breach_of_each_rule_is_seen() {
    let value = |name: &str, number| prost_types::EnumValueDescriptorProto {
        name: Some(name.into()),
        number: Some(number),
        ..Default::default()
    };
    let file = FileDescriptorProto {
        name: Some("weir/v1/Bad.proto".into()),
        package: Some("other".into()),
        syntax: Some("proto2".into()),
        message_type: vec![DescriptorProto {
            name: Some("bad_message".into()),
            field: vec![prost_types::FieldDescriptorProto {
                name: Some("BadField".into()),
                ..Default::default()
            }],
            ..Default::default()
        }],
        enum_type: vec![EnumDescriptorProto {
            name: Some("Kind".into()),
            value: vec![value("OTHER", 0)],
            ..Default::default()
        }],
        service: vec![ServiceDescriptorProto {
            name: Some("Bad".into()),
            method: vec![prost_types::MethodDescriptorProto {
                name: Some("get".into()),
                input_type: Some(".weir.v1.One".into()),
                output_type: Some(".weir.v1.One".into()),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut report = Report::default();
    report.check(&file, &mut BTreeMap::new());
    let told = report.wrong.join("\n");
    for rule in [
        "the folder is the package",
        "ends in a version",
        "proto3",
        "a file is lower_snake_case",
        "a message is PascalCase",
        "a field is lower_snake_case",
        "begins with KIND_",
        "zero is KIND_UNSPECIFIED",
        "ending in Service",
        "an rpc is PascalCase",
        "its Request is getRequest",
        "also used by",
        "has no comment",
    ] {
        assert!(told.contains(rule), "'{rule}' is not seen:\n{told}");
    }
}
