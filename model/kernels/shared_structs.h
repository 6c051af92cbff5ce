// Structs that Python fills or reads. Each is a list of fields that is written once, here in C: DEFINE_STRUCT makes the
// struct of it, and DESCRIBE_STRUCT the text from which model/kernels/packed_cpu_library.py makes its own.
#pragma once

#define FIELD_DEFINED(TYPE, NAME) TYPE NAME;
#define FIELD_DESCRIBED(TYPE, NAME) #TYPE " " #NAME ";"
#define DEFINE_STRUCT(NAME, FIELDS) typedef struct { FIELDS(FIELD_DEFINED) } NAME
#define DESCRIBE_STRUCT(NAME, FIELDS) #NAME "{" FIELDS(FIELD_DESCRIBED) "}"
